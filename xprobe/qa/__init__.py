"""Questions and contexts in many languages: records, readers, the built-in set, prompts with token spans."""
