"""What every floor stands on: terminal, signals, files, cache, pages. Nothing of ours; never torch."""
