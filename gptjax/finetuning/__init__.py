"""From a pretrained model to a task: what to start from, LoRA, preferences."""
