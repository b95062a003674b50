"""Moving volumes between two hosts: the protocol as pure code (docs/protocol.md is the table, this is its execution).

`messages` and `wire` say what travels, `codec` how pages do, `states` what is durable, `events` what goes into and
comes out of the two machines in `source` and `target`, `order` in which order pages are asked for. A machine's module
is its table of states; what they do is in a module for each phase (`source_rounds`, `target_pull`, ...). Nothing here
does I/O, reads a clock or draws a random number: time and fresh ids are arguments.
"""
