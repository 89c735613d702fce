"""The search for learning rates and weight decays: fields, ranges and the rule of selection (appendix B.1)."""
