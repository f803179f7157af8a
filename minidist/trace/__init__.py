"""What a run did, and when: the recorder (recorder.py); the narrator, who tells it as it goes (narrator.py); and the
document's steps, by which both name what they see (labels.py)."""

from .labels import LABELS
from .narrator import narrate
from .recorder import Recorder, record

__all__ = ["LABELS", "Recorder", "narrate", "record"]
