"""What drawing needs beside its loop: prompts, records, candidates, the gallery."""
