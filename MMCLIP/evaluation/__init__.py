"""What a trained MMCLIP can do: zero-shot metrics, grounding, and the files that report them."""
