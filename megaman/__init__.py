"""What both scripts stand on. README, «What is where», says what each file knows."""
