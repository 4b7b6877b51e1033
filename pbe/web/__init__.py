"""The web page and the API behind it: ``pbe serve``. Nothing here imports torch or Gradio until it serves."""
