"""One run from start to end: the session, the loop, evaluation, the end."""
