"""What megaman_lora.py and generate_megaman.py stand on. README, «What is where», says what each file knows."""
