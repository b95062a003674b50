"""Other stores: who they are (identity, pairing, tls), talking to them (listener, hub, session, bulk), and moving
volumes to and from them (migrations, mover and what they use). docs/peers.md is the page for all of it.

`silofs.peers.service.start` is what the daemon calls; nothing is imported here, so that the command line can use the
identity without the rest.
"""
