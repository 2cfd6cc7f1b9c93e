"""Which prompts share a forward pass, and the forward pass that leaves chosen hidden rows in a buffer."""
