"""Radiology language: vocabulary, entities, prompts and report clean-up."""
