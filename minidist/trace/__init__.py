"""What a run did, and when: the recorder (recorder.py), and the narrator who tells it as it goes (narrator.py)."""

from .recorder import Recorder, record

__all__ = ["Recorder", "record"]
