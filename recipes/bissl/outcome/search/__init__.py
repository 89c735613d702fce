"""The search for learning rates and weight decays."""
