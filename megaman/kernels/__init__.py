"""How layers compute on a CPU, and how its memory is used again."""
