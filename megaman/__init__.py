"""The rooms behind megaman_lora.py and generate_megaman.py. README's file tree says what each one knows."""
