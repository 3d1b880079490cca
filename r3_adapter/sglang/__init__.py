"""The rollout side: capture of routes from SGLang, and what lets SGLang run without a GPU."""
