/* What init.c and snapshot.c have agreed upon: init says that it is ready, and waits for a connection to this port of vsock. */

#define READY "init is ready for its snapshot"
#define READY_PORT 1024
