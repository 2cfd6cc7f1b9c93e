"""Loading models, and finding their blocks, final norm and head."""
