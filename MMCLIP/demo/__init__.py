"""The web demo of `examples/app.py`: reading.py asks the model, pages.py writes HTML, interface.py is Gradio."""
