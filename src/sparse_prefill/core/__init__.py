"""What every part shares: prompts, layers, logits, what is known of keys, and the checks of what is passed in."""
