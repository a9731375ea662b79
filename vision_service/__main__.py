"""`python -m vision_service` is `vision-service`."""

from vision_service.cli import app

app(prog_name="vision-service")
