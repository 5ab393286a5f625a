"""The web page: captions, classes and searches for whoever visits. `page`, `inputs` and `server` need gradio."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it as it is imported, and would report to its makers
