/* Prints the addresses of a name, IPv6 first, or why there are none. */

#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

static void print_all(const struct addrinfo *found, int family)
{
    char text[INET6_ADDRSTRLEN];
    for (; found; found = found->ai_next) {
        if (found->ai_family != family)
            continue;
        const void *address = family == AF_INET
            ? (const void *)&((const struct sockaddr_in *)found->ai_addr)->sin_addr
            : (const void *)&((const struct sockaddr_in6 *)found->ai_addr)->sin6_addr;
        puts(inet_ntop(family, address, text, sizeof text));
    }
}

int main(int argc, char **argv)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    int error = argc == 2 ? getaddrinfo(argv[1], NULL, &hints, &found) : EAI_NONAME;
    if (error) {
        puts(gai_strerror(error));
        return 1;
    }
    print_all(found, AF_INET6);
    print_all(found, AF_INET);
    return 0;
}
