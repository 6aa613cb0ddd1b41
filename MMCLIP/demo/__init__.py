"""The web demo of `examples/app.py`: pages.py writes HTML, interface.py is Gradio; the model is asked by
`MMCLIP/inference/reading.py`."""
