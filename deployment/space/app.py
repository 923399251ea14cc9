"""The chat page as a Hugging Face Space: a model of your own behind a page that asks for a password."""

import os
import sys
from pathlib import Path

from llmcourse.page import launch
from llmcourse.shipping import served


def database() -> str:
    "A file on the Space's persistent storage, where it has one."
    return os.environ.get("DATABASE_URL") or ("/data/chat.db" if Path("/data").is_dir() else "chat.db")


def main() -> None:
    password = os.environ.get("CHAT_PASSWORD")
    if not password:
        sys.exit("no CHAT_PASSWORD: set it as a secret in the settings of the Space")
    port = int(os.environ.get("GRADIO_SERVER_PORT", 7860))
    with served(os.environ.get("MODEL", "tutor/rl")) as server:
        launch(server.url, database(), port, host="0.0.0.0", auth=("guest", password))


if __name__ == "__main__":
    main()
