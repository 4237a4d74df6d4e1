/* What server.c and client.c have agreed upon. */

enum {
    ECHO = 7001,
    GIVE = 7002,
    TAKE = 7003,
    RUN = 7004,
    BLOCK = 1 << 18
};
