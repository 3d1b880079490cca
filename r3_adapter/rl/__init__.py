"""What a run learns from: tasks, prompts, rewards and losses, and the checks of its flags."""
