/* Headers of Python 3.8 and 3.9 include this; zig has none, and nothing of it is used. */
