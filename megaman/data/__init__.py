"""Pictures and captions as people have them. Knows no model and no LoRA."""
