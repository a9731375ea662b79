"""How fast a model is: its network alone, the pipeline in process, and behind the server."""
