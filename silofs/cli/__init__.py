"""The command line (docs/cli.md). Nothing in here imports trio, lmdb, numpy, rich or pyfuse3 before a verb needs it."""
