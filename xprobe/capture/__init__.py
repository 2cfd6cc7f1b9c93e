"""Forward passes that keep chosen hidden rows of every layer. Prompts share passes where the model allows it."""
