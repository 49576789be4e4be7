"""The demo model of squawq, as a folder of files."""

from pathlib import Path

FOLDER = Path(__file__).parent / "demo_model"
