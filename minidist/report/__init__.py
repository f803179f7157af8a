"""`python -m minidist report DIR`: a traced run as one page to look at, and as files for other programs."""

from .page import page, write_page
