"""The settings of both scripts: every fact of a flag stands at the flag. Never imports torch."""
