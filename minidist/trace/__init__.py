"""What a run did, and when: the recorder (recorder.py); the narrator, who tells it as it goes (narrator.py); the
document's steps, by which both name what they see (labels.py); and the reader of what was recorded:

    trace = read("run1")                  # the folder that --trace has written
    breakdown(trace)[0].compute           # of rank 0, nanoseconds in each training step
    traffic(trace).bytes                  # who sent how much to whom
    write_chrome(trace, "trace.json")     # for https://ui.perfetto.dev
"""

from .analysis import Breakdown, Traffic, breakdown, memory, time_by_label, time_by_layer, traffic
from .chrome import write_chrome
from .labels import LABELS
from .narrator import narrate
from .read import read
from .recorder import Recorder, record
from .tables import Trace

__all__ = [
    "LABELS",
    "Breakdown",
    "Recorder",
    "Trace",
    "Traffic",
    "breakdown",
    "memory",
    "narrate",
    "read",
    "record",
    "time_by_label",
    "time_by_layer",
    "traffic",
    "write_chrome",
]
