"""Arrays in, arrays out: the network and what stands directly around it.

Nothing here knows a file format, a thread or a setting.
"""
