"""The adapter: in the model, in every tool's file, in the base's weights."""
