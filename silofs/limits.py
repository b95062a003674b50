"""Every bound of silofs in one place, with its unit and what it protects. Nothing else hard-codes one."""

from __future__ import annotations

import re

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

# Names and sizes. A name that comes from a peer, a file system call or the command line passes the same test.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
IMAGE_SUFFIX = ".img"
SECTOR = 512  # bytes; sizes are multiples of it
SIZE_MIN = 4096  # bytes; the command line's smallest volume (a file may pass through 0)
SIZE_MAX = 1 << 50  # bytes; 1 PiB: keeps page numbers far below 2^44

# The store
MAP_BYTES_START = 1 * GIB  # LMDB map size at least; else four times the file system, doubled when full
MAP_BYTES_MAX = 1 << 46  # 64 TiB of address space at most
CHAIN_DEPTH_MAX = 1000  # layers; those that nothing names are merged long before
MERGE_DEPTH = 8  # layers; deeper chains are merged even where that gives nothing back
MAX_READERS = 126  # LMDB reader slots
HELD_AHEAD_BYTES = 64 * MIB  # allocated for writes that are still to come, whenever more must be allocated
HELD_LEAVES_BYTES = 8 * MIB  # of the file system that are not held: for sockets, logs and what LMDB does not see
HELD_RESERVE_BYTES = 16 * MIB  # of what is held that only deletes, the cleaner and ownership records may use
SPACE_FLOOR_BYTES = 64 * MIB  # the same of the whole file system, where space cannot be held
VOID_LEAVES = 256  # of a volume, zeroed in one commit by changing each; whole leaves beyond become void
CELL_OBJECTS_MIN = 8  # objects stored at a time (1 MiB) that go to cells: fewer are not worth another fdatasync
CELLS_FLOOR_BYTES = 128 * MIB  # of the file system that cells leave to LMDB, whose space is held
CELLS_KEPT = 1024  # free cells that keep their blocks (128 MiB), to be used again; others are punched
CELLS_PUNCHED = 64  # ranges of them in one commit
CELLS_RETRY_S = 60.0  # after cells could not be written
REOPEN_BYTES = 512 * MIB  # at either end of the data file, compared with the disk after an error of LMDB

# The write log (memfd ring) and commits
LOG_BYTES = 96 * MIB  # ring size; also the bound on what may wait for a commit, and so on what LMDB holds in one
CROWD_BYTES = 32 * MIB  # of writes that wait for room in the ring; beyond it no further request is read for now
LOG_RECORD_MAX = 1 * MIB + 4096  # bytes of payload in one record
COMMIT_BYTES = 16 * MIB  # a background commit starts at this much pending
COMMIT_AHEAD_BYTES = 32 * MIB  # or at this much, where most of it was written ahead of the commit
AHEAD_BYTES = 4 * MIB  # of long writes to one volume, at least, are put into cells ahead of their commit
COMMIT_AGE_S = 2.0  # or at this age of the oldest pending record
COMMIT_LEAVES = 4096  # or at this many leaves touched
COMMIT_RETRY_S = 1.0  # after a commit failed
JOURNAL_BYTES = 16 * MIB  # an fsync with more than this to journal is a commit
JOURNAL_RETRY_S = 60.0  # after a journal failed, or could not be made
ADMIT_BYTES = 4 * MIB  # writes are admitted against space asked for in such steps
STEP_S = 0.01  # of the writer's time that one step of background work takes, and a waiting fsync with it
STEP_LEAVES = 256  # leaves that it looks at or changes
STEP_PAGES = 310  # pages that it stores again (ten objects)
CLEAN_AT = 1.85  # the cleaner holds what objects take at so many times what is live in them
CLEAN_SLACK_PAGES = 4096  # and lets them take so much more (16 MiB, a commit's worth)
LONE_AGE = 4096  # object ids: lone pages that are younger may be overwritten soon, and are not packed
BACKGROUND_SHARE = 0.5  # of the time that background work takes at most while it has no hurry
BACKGROUND_WAIT_S = 10.0  # when there was nothing to do and nothing was committed since, it looks again after this long
BACKGROUND_RETRY_S = 10.0  # after a step failed, times the failures in a row
CONTAINER_LEAVES_MAX = 256  # leaves that refer to one container before its blocks are stored anew: moving it is a step
PACK_AGE_S = 6 * 3600.0  # a named snapshot that is older, and what it is built on, are packed in the background
PACK_LOOK_S = 60.0  # how often such snapshots are looked for
REPACK_BELOW = 0.5  # of a container's pages: with fewer that anything refers to, they move together with others
REPACK_LOOK_S = 300.0  # between rounds through all containers
SHARE_PAGES = 32768  # of a shared copy in one transaction (128 MiB)
SHARE_MOVED_PAGES = 2048  # of those, pages that are stored again, in containers (8 MiB)
PACK_THREADS = 4  # that compress for one import
PACK_PAGES_MIN = 4  # data pages of a block of 16 below which it is not packed
CONTAINER_REFS_MAX = 30000  # references to one of its pages: they are counted in 16 bits
HANDLES_MAX = 4096  # open handles per mount
LOCKS_MAX = 8192  # byte range locks per mount, and
LOCKS_HANDLE_MAX = 1024  # set through one handle
QUARANTINE_MAX = 1024  # places that the medium cannot give
NOTES_MAX = 64  # who may look at pages of the store at a time and say so in the memfd

# Caches
WRITER_LEAVES = 2048  # leaves of heads that the writer keeps between commits, 4 or 8 KiB each
RESOLVED_LEAVES = 4096  # resolved leaves kept, 4 KiB each: 16 MiB, covers 8 GiB of hot volume
SEEK_LEAVES = 256  # resolved in one go by a search for data or holes: some 10 ms of a thread
READ_THREADS = 8  # cold reads in flight
UNPACKED_BLOCKS = 128  # blocks of containers kept as they were before packing, 64 KiB each: 8 MiB
WARM_OBJECTS = 65536  # objects believed to be in memory, 124 KiB of pages each: 8 GiB
WARM_S = 30.0  # what nobody read for this long may have left the page cache: a thread touches it first
FETCHED_PAGES = 2048  # pages that came from a peer and are not in the store yet: 8 MiB

MEMORY_KEPT_BYTES = 256 * MIB  # of the daemon's own; what malloc keeps free beyond that is returned ...
MEMORY_LOOK_S = 15.0  # ... when it is looked at, this often

# FUSE
FUSE_MAX_TASKS = 5000  # parked requests of one volume must not stall another
DAMAGE_TOLD_MAX = 1000  # different damages that a daemon logs
FUSE_POLL_BURST = 64  # requests served in a row before the loop gets a real checkpoint ...
FUSE_BURST_NS = 2_000_000  # ... or for so long
FUSE_SPIN_NS = 100_000  # the next request is asked for again and again for so long before it is waited for ...
FUSE_SPIN_REST = 16  # ... but not at so many waits after one at which that was for nothing
ALONE_FLUSHES = 16  # in a row of one client, and nobody else's request, before its fsyncs are written in place
IN_PLACE_BYTES = 1 << 16  # of the log that such a write has, at most ...
IN_PLACE_NS = 1_000_000  # ... and what the last one may have taken ...
IN_PLACE_REST = 100  # ... else so many more flushes in a row are needed
REQUEST_BYTES_MAX = 1 * MIB
FUSE_MAX_BACKGROUND = 4096  # asynchronous requests in flight in the kernel; with libfuse's 12 one volume stalls all

# The holder and its daemon
CRASH_DEATHS = 50  # so many deaths of the daemon ...
CRASH_WINDOW_S = 30.0  # ... within this time are a crash loop: I/O is held and the daemon started at growing intervals
CRASH_STARTS = 10  # ... and so are more daemons in a row that die before they have served anything
CRASH_DELAY_S = 1.0  # the first such interval
CRASH_DELAY_MAX_S = 30.0
START_S = 120.0  # a daemon opens the store and replays the log within this, or is killed
PING_DAEMON_S = 2.5  # the holder asks the daemon for a sign of life
PONG_DAEMON_S = 10.0  # and kills one that gave none for so long
DRAIN_S = 10.0  # a daemon told to stop finishes the requests that it has read within this
LOG_FILE_BYTES = 8 * MIB  # of silofs.log; then it is renamed to silofs.log.1, in the place of the one before
SAME_COMPLAINT_S = 60.0  # between two log lines about the same lack (of file descriptors)
STANDBY_S = 1.0  # after a daemon began to serve, its successor's interpreter is started

# The control socket
CONTROL_LINE_BYTES_MAX = 1 * MIB  # of a request
CONTROL_CONNECTIONS_MAX = 64  # at a time; each is one command
CONTROL_REQUEST_S = 10.0  # a connection that has not sent its request by then is closed
CONTROL_FDS_MAX = 4  # files that may come with one request
HOLD_S = 30.0  # a volume that was frozen by a command thaws itself after this, unless the command says
HOLD_MAX_S = 3600.0  # at most; guests give a disk up whose writes hang
HOLD_TEXT_MAX = 200  # characters of a freeze's owner and reason
TRANSFERS_MAX = 16  # imports, exports, diffs and checks at a time; each has a thread for as long as it runs
SNAPSHOTS_AT_ONCE = 256  # snapshots that one command takes in one transaction
ANSWER_S = 5.0  # a command that has heard nothing for so long asks whether the daemon hears at all ...
SIGN_OF_LIFE_S = 5.0  # ... and ends with "try again" when that is not answered within this
HOLDER_WAIT_S = 5.0  # a command waits this long for the daemon of a holder before it ends with "try again"
TOP_INTERVAL_MIN_S, TOP_INTERVAL_MAX_S = 0.1, 3600.0  # between two refreshes of `silofs top`

# Streams (docs/stream.md)
STREAM_HEAD_BYTES_MAX = 4096  # of a header's body
STREAM_PAGES = 256  # pages of data in one frame (1 MiB)
STREAM_RUNS = 4096  # runs in one frame
STREAM_ZEROS = 512  # runs of zeroed pages in one transaction of an import
STREAM_KEEP_S = 7 * 86400.0  # what an import that was interrupted has stored is kept this long for the next attempt

# Peers and migration
FRAME_BYTES_MAX = 2 * MIB  # one frame on the wire, checked before allocation
HANDSHAKE_S = 10.0  # an unauthenticated connection lives no longer
UNAUTHENTICATED_MAX = 16  # such connections at a time
PING_S = 5.0
PING_MISSED_MAX = 3
INVITE_S = 600.0  # life of a pairing token
FETCH_DEADLINE_S = 20.0  # a read of a remote page waits this long, then EIO
INCOMING_WRITE_WAIT_S = 30.0  # a write at the new home waits this long for the GRANT, then EBUSY
CEDED_READ_WAIT_S = 10.0  # a read at the old home waits this long for the new owner's ACK, then ESTALE
FREEZE_S = 1.0  # from the freeze to the CEDED transaction, else thaw
PAUSE_BUDGET_S = 0.3  # pre-copy rounds end when the rest fits
ROUNDS_MAX = 30
RETAIN_S = 3600.0  # a retired copy is kept this long
BULK_WINDOW_BYTES = 16 * MIB  # sent and not yet durable at the peer

# The migration protocol (docs/protocol.md); each bounds what one decoded message can hold
GROUP_MAX = 64  # volumes in one migration
SEGMENTS_MAX = 4096  # layers that one migration names
STATES_MAX = 1024  # sealed layers of a volume that an OFFER lists, newest first
SNAPSHOTS_MAX = 4096  # named snapshots that travel with a group
RUNS_MAX = 8192  # runs of a map in one MAP message or GRANT; the rest is asked for
PULL_RUNS_MAX = 256  # runs of pages in one PULL
PULL_PAGES = 256  # pages in one PULL (1 MiB): the unit of credit
PULLS_MAX = 1024  # demand and hint PULLs that wait at most
HELLO_VOLUMES_MAX = 16384  # volumes in a HELLO
REPEAT_S = 5.0  # an unanswered message is sent again after this long
PULL_STALL_S = 30.0  # with pages asked for and none arriving for this long, they are asked for again
PREPARE_S = 5.0  # PREPARE is given up after this long, and a round follows
FREEZE_TRIES_MAX = 5  # freezes that end in a thaw before the migration gives up
CLOSING_ROUND_S = 0.5  # a switch-over on command needs a round that was sealed no longer ago than this
