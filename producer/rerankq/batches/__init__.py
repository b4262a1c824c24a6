"""Batches: files of requests, a line of JSON each, ranked as bulk jobs and answered line by line.

:mod:`.requests` reads a line and writes its answer (pure), :mod:`.journal` keeps the answers, :mod:`.running` ranks
what is not answered yet. The gateway and the command line share them.
"""
