// SPDX-License-Identifier: Apache-2.0
/*
 * TSI's part in the guest's kernel: what applications of the box send to the outside is sent to the
 * agent instead, and shown to them as what they asked for.
 *
 * A destination is replaced by an address that only names the flow:
 *
 *     IPv4  127.128.0.0/10 + id      IPv6  fd54:5349::/64 + id      port AGENT_PORT
 *
 * Both are local, so the agent receives it; the id leads back to the original destination, for the
 * agent and for whatever tells the application its peer's address. A connection request (SYN) goes
 * to the agent as an event instead, and comes to its listener only when the host has connected:
 * connect() gets the host's answer.
 *
 * All programs are attached to the box's cgroup. The agent is not in it, and sockets of other
 * network namespaces have a loopback of their own: neither is touched.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#define SOCK_STREAM 1
#define SOCK_DGRAM 2
#define AF_INET 2
#define AF_INET6 10
#define EADDRNOTAVAIL 99
#define ENOBUFS 105
#define ECONNREFUSED 111
#define EHOSTUNREACH 113
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd

/* These and the layout of the structures: guest/src/tsi/program.rs. */
#define AGENT_PORT bpf_htons(1)
#define CLIENT_PORT bpf_htons(2) /* of its connections for clients of published ports */
#define DNS_PORT bpf_htons(53)
#define FLOW_NET4 0x7f800000
#define FLOW_MASK4 0xffc00000
#define FLOW_NET6_0 bpf_htonl(0xfd545349)
/* The guest's own addresses are this, and one beside the flows' (guest/src/tsi/mod.rs). */
#define OWN_IP4 bpf_htonl(0xc0000008)

/* Ids have 22 bits; the top two say whose they are. */
#define ID_BITS 20
#define KIND_CONNECTED 0
#define KIND_DATAGRAM (1 << ID_BITS)
#define KIND_PUBLISHED (2 << ID_BITS) /* made by the agent */

/* The host has 3,072 connections at once; beside those there are sockets that are ending, and UDP's. A table has
 * as many buckets, and each is set up at the start. */
#define CONNECTED_MAX 8192
#define DATAGRAM_MAX 4096
#define EVENTS_LEN (256 * 1024)
#define RESOLVERS 4
#define PREFIXES_MAX 4096
#define EXCEPTIONS 8
#define CLIENTS_MAX 4096

/* A box with a network of its own needs only its servers' answers carried (guest/build.rs). */
#ifndef HAS_OWN_NETWORK
#define HAS_OWN_NETWORK false
#endif

struct ip {
	__u32 word[4]; /* IPv6, or IPv4 as IPv4-mapped */
};

enum state {
	NEW,   /* no SYN yet */
	ASKED, /* the agent was given one, and has not let them pass */
	OPEN,  /* the host has connected: SYNs may pass */
};

struct flow {
	__u64 cookie; /* of the socket */
	struct ip ip; /* original destination */
	__u16 port;   /* big-endian */
	__u8 protocol;
	__u8 state;
	__u16 error;       /* of datagrams that the host has refused, until the socket has been told; else 0 */
	__u16 server_port; /* big-endian; of clients of a published UDP port: their server's; else 0 */
};

/* Whom a server answers. */
struct client_key {
	struct ip ip;
	__u16 port;        /* big-endian */
	__u16 server_port; /* big-endian */
};

struct datagram_key {
	__u64 cookie;
	struct ip ip;
	__u32 port; /* big-endian, in the low half */
	__u32 reserved;
};

enum event_kind {
	SYN,
	RELEASED, /* a socket was closed */
	REPLACED, /* a socket has a new flow in this one's place */
	REFUSED,  /* a datagram, by what the host has said beforehand */
};

#define PACKET_MAX 128 /* IPv6 and TCP headers with all their options */

struct syn_event {
	__u32 kind;
	__u32 id;
	struct flow flow;
	__u32 packet_len;
	__u8 packet[PACKET_MAX];
	__u32 reserved;
};

struct end_event {
	__u32 kind;
	__u32 id; /* 0: the socket has only sent datagrams */
	__u64 cookie;
};

struct refused_event {
	__u32 kind;
	__u32 reserved;
	struct flow flow; /* that it would have had */
};

/* Key of a trie. */
struct prefix {
	__u32 len;
	struct ip ip;
};

/* What becomes of datagrams to a prefix. */
struct outlook {
	__u16 refused;            /* 0 or 1 */
	__u16 except[EXCEPTIONS]; /* ports at which it is the other way round, big-endian; or 0 */
};

_Static_assert(sizeof(struct flow) == 32 && sizeof(struct syn_event) == 176 &&
		       sizeof(struct end_event) == 16 && sizeof(struct refused_event) == 40 &&
		       sizeof(struct outlook) == 2 + 2 * EXCEPTIONS && EXCEPTIONS == 8,
	       "as in program.rs");

struct map_def {
	unsigned int type, key_size, value_size, max_entries, map_flags;
};
#define MAP(name, t, k, v, n, f)                                                                   \
	struct map_def SEC("maps") name = {                                                        \
		.type = BPF_MAP_TYPE_##t, .key_size = k, .value_size = v, .max_entries = n,       \
		.map_flags = f                                                                     \
	}

/* id -> flow, of connected sockets and of the agent's connections to published ports */
MAP(flows, HASH, sizeof(__u32), sizeof(struct flow), CONNECTED_MAX, BPF_F_NO_PREALLOC);
/* cookie -> id, of connected sockets; 0 for one that has only sent datagrams */
MAP(sockets, HASH, sizeof(__u64), sizeof(__u32), CONNECTED_MAX, BPF_F_NO_PREALLOC);
/* The same two for datagrams of sockets that are not connected. What is not used is forgotten. */
MAP(datagram_flows, LRU_HASH, sizeof(__u32), sizeof(struct flow), DATAGRAM_MAX, 0);
MAP(datagram_ids, LRU_HASH, sizeof(struct datagram_key), sizeof(__u32), DATAGRAM_MAX, 0);
#ifdef WITH_CLIENTS
/* client -> id, of clients of published UDP ports, by the agent */
MAP(clients, HASH, sizeof(struct client_key), sizeof(__u32), CLIENTS_MAX, BPF_F_NO_PREALLOC);
#endif
/* what the host has said beforehand */
MAP(outlooks, LPM_TRIE, sizeof(struct prefix), sizeof(struct outlook), PREFIXES_MAX, BPF_F_NO_PREALLOC);
/* last id given out, per kind */
MAP(last_ids, ARRAY, sizeof(__u32), sizeof(__u32), 2, 0);
#ifdef WITH_RESOLVERS
/* loopback addresses of resolv.conf; the values mean nothing */
MAP(resolvers, HASH, sizeof(struct ip), sizeof(__u8), RESOLVERS, BPF_F_NO_PREALLOC);
#endif
/* for the agent */
MAP(events, RINGBUF, 0, 0, EVENTS_LEN, 0);

/* ---- addresses -------------------------------------------------------------------------------- */

static __always_inline struct ip mapped(__u32 ip4)
{
	return (struct ip){ { 0, 0, bpf_htonl(0xffff), ip4 } };
}

/* Words are compared at once, here and below: each branch makes the verifier walk all that follows again. */
static __always_inline bool is_mapped(const struct ip *ip)
{
	return (ip->word[0] | ip->word[1] | (ip->word[2] ^ bpf_htonl(0xffff))) == 0;
}

static __always_inline bool is_flow4(__u32 ip4)
{
	return (ip4 & bpf_htonl(FLOW_MASK4)) == bpf_htonl(FLOW_NET4);
}

static __always_inline bool is_flow6(const struct ip *ip)
{
	return ((ip->word[0] ^ FLOW_NET6_0) | ip->word[1] | ip->word[2]) == 0;
}

/* The id that an address names, or -1. */
static __always_inline __s64 id_of(const struct ip *ip)
{
	if (is_mapped(ip) && is_flow4(ip->word[3]))
		return bpf_ntohl(ip->word[3]) & ~FLOW_MASK4;
	if (is_flow6(ip))
		return bpf_ntohl(ip->word[3]) & ~FLOW_MASK4;
	return -1;
}

static __always_inline struct ip flow_ip(__u32 id, bool ip4)
{
	if (ip4)
		return mapped(bpf_htonl(FLOW_NET4 | id));
	return (struct ip){ { FLOW_NET6_0, 0, 0, bpf_htonl(id) } };
}

/* Destinations that leave the guest. The kernel has no route to the rest (multicast, broadcast,
 * link-local), which is the answer that applications get, or they are the guest itself. */
static __always_inline bool is_outside(const struct ip *ip)
{
	if (is_mapped(ip)) {
		__u32 top = bpf_ntohl(ip->word[3]) >> 24;

		return top != 0 && top != 127 && top < 224 && ip->word[3] != OWN_IP4;
	}
	if ((ip->word[0] | ip->word[1] | ip->word[2]) == 0 && bpf_ntohl(ip->word[3]) <= 1)
		return false;
	__u32 top = bpf_ntohl(ip->word[0]);

	return top >> 24 != 0xff && top >> 22 != 0xfe80 >> 6 &&
	       ((ip->word[0] ^ FLOW_NET6_0) | ip->word[1]) != 0;
}

#ifdef WITH_RESOLVERS
/* Whether a loopback address is a resolver of resolv.conf that nobody in the guest plays. */
static __always_inline bool is_hosts_resolver(struct bpf_sock_addr *ctx, const struct ip *ip)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *server;
	__u32 len;

	if (ctx->user_port != DNS_PORT || !bpf_map_lookup_elem(&resolvers, ip))
		return false;
	if (is_mapped(ip)) {
		tuple.ipv4.daddr = ip->word[3];
		tuple.ipv4.saddr = bpf_htonl(0x7f000001);
		tuple.ipv4.dport = DNS_PORT;
		tuple.ipv4.sport = AGENT_PORT;
		len = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.daddr, ip, sizeof(*ip));
		__builtin_memcpy(tuple.ipv6.saddr, ip, sizeof(*ip));
		tuple.ipv6.dport = DNS_PORT;
		tuple.ipv6.sport = AGENT_PORT;
		len = sizeof(tuple.ipv6);
	}
	if (ctx->protocol == IPPROTO_UDP)
		server = bpf_sk_lookup_udp(ctx, &tuple, len, BPF_F_CURRENT_NETNS, 0);
	else
		server = bpf_sk_lookup_tcp(ctx, &tuple, len, BPF_F_CURRENT_NETNS, 0);
	if (server) {
		bpf_sk_release(server);
		return false;
	}
	return true;
}
#else
/* Few resolv.confs name one, and to verify this costs a start more than a millisecond: the agent loads these
 * programs with it only if they do. */
static __always_inline bool is_hosts_resolver(const struct bpf_sock_addr *ctx, const struct ip *ip)
{
	(void)ctx;
	(void)ip;
	return false;
}
#endif

/* Other network namespaces have a loopback of their own. */
static __always_inline bool is_of_box(struct bpf_sock_addr *ctx)
{
	return bpf_get_netns_cookie(ctx) == bpf_get_netns_cookie(NULL);
}

static __always_inline bool is_carried(struct bpf_sock_addr *ctx, const struct ip *ip)
{
	if (HAS_OWN_NETWORK || (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP))
		return false;
	return is_of_box(ctx) && (is_outside(ip) || is_hosts_resolver(ctx, ip));
}

/* ---- ids ---------------------------------------------------------------------------------------- */

/* Files a flow under an id of its own. Ids come round: those of sockets that are still there are
 * passed over. 0: there is none, which is no id. */
static __always_inline __u32 new_id(void *map, __u32 kind, const struct flow *flow)
{
	__u32 key = kind != KIND_CONNECTED;
	__u32 *last = bpf_map_lookup_elem(&last_ids, &key);

	if (!last)
		return 0;
#pragma unroll
	for (int i = 0; i < 4; i++) {
		/* In turn, or past a run of those that are taken. */
		__u32 id = i ? bpf_get_prandom_u32() : __sync_fetch_and_add(last, 1) + 1;

		id = kind | (id & ((1 << ID_BITS) - 1));
		if (id != kind && bpf_map_update_elem(map, &id, flow, BPF_NOEXIST) == 0)
			return id;
	}
	return 0;
}

static __always_inline int refuse(int error)
{
	bpf_set_retval(-error);
	return 0;
}

/* A flow has lost its socket. TCP's is of no more use; the agent may still have to read datagrams,
 * and forgets the flow then. */
static __always_inline void end_flow(__u32 kind, __u32 id, __u64 cookie)
{
	struct end_event event = { .kind = kind, .id = id, .cookie = cookie };
	struct flow *flow = bpf_map_lookup_elem(&flows, &id);
	bool told = bpf_ringbuf_output(&events, &event, sizeof(event), 0) == 0;

	if (flow && flow->cookie == cookie && (flow->protocol != IPPROTO_UDP || !told))
		bpf_map_delete_elem(&flows, &id);
}

#ifdef WITH_CLIENTS
/* The id of the client of a published UDP port whom the socket answers by sending there, or 0. */
static __always_inline __u32 client_of(struct bpf_sock_addr *ctx, const struct ip *ip)
{
	struct client_key key = {
		.ip = *ip,
		.port = ctx->user_port,
		.server_port = bpf_htons(ctx->sk->src_port),
	};
	__u32 *id;

	if (ctx->protocol != IPPROTO_UDP || !is_of_box(ctx))
		return 0;
	id = bpf_map_lookup_elem(&clients, &key);
	return id ? *id : 0;
}

static __always_inline bool is_client(const struct flow *flow)
{
	return flow->server_port != 0;
}

static __always_inline bool is_server(const struct bpf_sock_addr *ctx, const struct flow *flow)
{
	return is_client(flow) && flow->server_port == bpf_htons(ctx->sk->src_port);
}
#else
/* Few boxes publish UDP ports: as for resolvers. */
static __always_inline __u32 client_of(const struct bpf_sock_addr *ctx, const struct ip *ip)
{
	(void)ctx;
	(void)ip;
	return 0;
}

static __always_inline bool is_client(const struct flow *flow)
{
	(void)flow;
	return false;
}

static __always_inline bool is_server(const struct bpf_sock_addr *ctx, const struct flow *flow)
{
	(void)ctx;
	(void)flow;
	return false;
}
#endif

/* connect(): the socket has one flow, which replaces the one it may have had. 0: no id is free. */
static __always_inline __u32 connect_flow(struct bpf_sock_addr *ctx, const struct ip *ip,
					  __u32 client)
{
	struct flow flow = {
		.cookie = bpf_get_socket_cookie(ctx),
		.ip = *ip,
		.port = ctx->user_port,
		.protocol = ctx->protocol,
		.state = NEW,
	};
	__u32 *old = bpf_map_lookup_elem(&sockets, &flow.cookie);
	__u32 id;

	if (old && *old)
		end_flow(REPLACED, *old, flow.cookie);
	if (client) {
		/* Its flow ends when the host says so. */
		bpf_map_delete_elem(&sockets, &flow.cookie);
		return client;
	}
	id = new_id(&flows, KIND_CONNECTED, &flow);
	if (id && bpf_map_update_elem(&sockets, &flow.cookie, &id, BPF_ANY) == 0)
		return id;
	if (id)
		bpf_map_delete_elem(&flows, &id);
	bpf_map_delete_elem(&sockets, &flow.cookie);
	return 0;
}

/* Whether the host has said beforehand that it carries no datagrams to there. Nothing else tells a socket that is
 * not connected of the first one: the host answers when it has been sent. */
static __always_inline bool is_refused(const struct ip *ip, __u32 port)
{
	struct prefix key = { .len = 128, .ip = *ip };
	struct outlook *outlook = bpf_map_lookup_elem(&outlooks, &key);
	__u64 low = 1, high = 1;

	if (!outlook)
		return false;
	/* 0 if it is one of the four. */
#pragma unroll
	for (int i = 0; i < EXCEPTIONS / 2; i++) {
		low *= outlook->except[i] ^ port;
		high *= outlook->except[EXCEPTIONS / 2 + i] ^ port;
	}
	return (low && high) == outlook->refused;
}

/* sendto(): the socket has a flow per destination. 0: there is none, for this reason. */
static __always_inline __u32 datagram_flow(struct bpf_sock_addr *ctx, const struct ip *ip, int *why)
{
	struct datagram_key key = {
		.cookie = bpf_get_socket_cookie(ctx),
		.ip = *ip,
		.port = ctx->user_port,
	};
	struct flow flow = {
		.cookie = key.cookie,
		.ip = *ip,
		.port = ctx->user_port,
		.protocol = IPPROTO_UDP,
	};
	__u32 *known = bpf_map_lookup_elem(&datagram_ids, &key);
	__u32 zero = 0;
	struct flow *old;
	__u32 id;

	/* Looking it up keeps it from being forgotten. An error is told once, like a socket's own: no ICMP tells a
	 * socket that is not connected. */
	if (known && (old = bpf_map_lookup_elem(&datagram_flows, known))) {
		*why = old->error;
		old->error = 0;
		return *why ? 0 : *known;
	}
	if (is_refused(ip, key.port)) {
		struct refused_event event = { .kind = REFUSED, .flow = flow };

		/* For the host to count. */
		bpf_ringbuf_output(&events, &event, sizeof(event), 0);
		*why = EHOSTUNREACH;
		return 0;
	}
	*why = ENOBUFS;
	id = new_id(&datagram_flows, KIND_DATAGRAM, &flow);
	if (!id)
		return 0;
	bpf_map_update_elem(&datagram_ids, &key, &id, BPF_ANY);
	bpf_map_update_elem(&sockets, &flow.cookie, &zero, BPF_NOEXIST);
	return id;
}

static __always_inline struct flow *find(__u32 id)
{
	if (id & KIND_DATAGRAM)
		return bpf_map_lookup_elem(&datagram_flows, &id);
	return bpf_map_lookup_elem(&flows, &id);
}

/* ---- destinations -------------------------------------------------------------------------------
 *
 * Addresses that name flows are for the agent and these programs alone: nobody in the box may connect to one
 * or send to it, which would be another socket's flow, nor bind to one, and pose as somebody outside. */

/* The kernel gives these fields only by constant offsets, so they are copied one by one. */
static __always_inline struct ip read_ip6(const struct bpf_sock_addr *ctx)
{
	return (struct ip){ { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2],
			      ctx->user_ip6[3] } };
}

static __always_inline void write_ip6(struct bpf_sock_addr *ctx, const struct ip *ip)
{
	ctx->user_ip6[0] = ip->word[0];
	ctx->user_ip6[1] = ip->word[1];
	ctx->user_ip6[2] = ip->word[2];
	ctx->user_ip6[3] = ip->word[3];
}

/* An application names a flow: only its own, as the kernel does for connected sockets with IPv4-mapped
 * addresses, or that of a client whom it serves and who cannot be shown. */
static __always_inline int name_flow(struct bpf_sock_addr *ctx, __u32 id)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, &id);

	if (!is_of_box(ctx))
		return 1;
	if (flow && (flow->cookie == bpf_get_socket_cookie(ctx) || is_server(ctx, flow)))
		return 1;
	return refuse(ECONNREFUSED);
}

/* The agent's port for a flow's packets. */
static __always_inline __u32 agents_port(__u32 id)
{
	_Static_assert(CLIENT_PORT == AGENT_PORT << 1, "by the bit that says which it is");
	return (__u32)AGENT_PORT << (id >> (ID_BITS + 1) & 1);
}

static __always_inline int send4(struct bpf_sock_addr *ctx, bool connect)
{
	struct ip ip = mapped(ctx->user_ip4);
	int why = ENOBUFS;
	__u32 id = client_of(ctx, &ip);

	if (!id && !is_carried(ctx, &ip))
		return is_flow4(ctx->user_ip4) ?
			       name_flow(ctx, bpf_ntohl(ctx->user_ip4) & ~FLOW_MASK4) :
			       1;
	if (connect)
		id = connect_flow(ctx, &ip, id);
	else if (!id)
		id = datagram_flow(ctx, &ip, &why);
	if (!id)
		return refuse(why);
	ctx->user_ip4 = bpf_htonl(FLOW_NET4 | id);
	ctx->user_port = agents_port(id);
	return 1;
}

static __always_inline int send6(struct bpf_sock_addr *ctx, bool connect)
{
	struct ip ip = read_ip6(ctx);
	int why = ENOBUFS;
	__u32 id = client_of(ctx, &ip);

	if (!id && !is_carried(ctx, &ip))
		return id_of(&ip) >= 0 ? name_flow(ctx, bpf_ntohl(ip.word[3]) & ~FLOW_MASK4) :
				      1;
	if (connect)
		id = connect_flow(ctx, &ip, id);
	else if (!id)
		id = datagram_flow(ctx, &ip, &why);
	if (!id)
		return refuse(why);
	/* Read again: a family that is known from the beginning on would have the verifier walk all of the above twice. */
	barrier();
	ip = read_ip6(ctx);
	ip = flow_ip(id, is_mapped(&ip));
	write_ip6(ctx, &ip);
	ctx->user_port = agents_port(id);
	return 1;
}

SEC("cgroup/connect4") int tsi_connect4(struct bpf_sock_addr *ctx)
{
	return send4(ctx, true);
}

SEC("cgroup/connect6") int tsi_connect6(struct bpf_sock_addr *ctx)
{
	return send6(ctx, true);
}

SEC("cgroup/sendmsg4") int tsi_sendmsg4(struct bpf_sock_addr *ctx)
{
	return send4(ctx, false);
}

SEC("cgroup/sendmsg6") int tsi_sendmsg6(struct bpf_sock_addr *ctx)
{
	return send6(ctx, false);
}

SEC("cgroup/bind4") int tsi_bind4(struct bpf_sock_addr *ctx)
{
	return is_flow4(ctx->user_ip4) ? refuse(EADDRNOTAVAIL) : 1;
}

SEC("cgroup/bind6") int tsi_bind6(struct bpf_sock_addr *ctx)
{
	struct ip ip = read_ip6(ctx);

	return id_of(&ip) >= 0 ? refuse(EADDRNOTAVAIL) : 1;
}

/* ---- sources and peers --------------------------------------------------------------------------
 *
 * An address that names a flow counts only with a port of the agent's, which ordinary users cannot have: any
 * program may send from it by IP_PKTINFO. */

static __always_inline int show4(struct bpf_sock_addr *ctx)
{
	struct flow *flow;

	if (!is_flow4(ctx->user_ip4) || ctx->user_port != agents_port(bpf_ntohl(ctx->user_ip4)))
		return 1;
	flow = find(bpf_ntohl(ctx->user_ip4) & ~FLOW_MASK4);
	if (!flow)
		return 1;
	/* A client over IPv6 at a server that has only IPv4 cannot be shown. If it is answered by its address, it keeps
	 * that of its flow. */
	if (is_client(flow) && !is_mapped(&flow->ip))
		return 1;
	ctx->user_ip4 = is_mapped(&flow->ip) ? flow->ip.word[3] : bpf_htonl(0x7f000001);
	ctx->user_port = flow->port;
	return 1;
}

static __always_inline int show6(struct bpf_sock_addr *ctx)
{
	struct ip ip = read_ip6(ctx);
	__s64 id = id_of(&ip);
	struct flow *flow;

	if (id < 0 || ctx->user_port != agents_port(id))
		return 1;
	flow = find(id);
	if (!flow)
		return 1;
	/* Nor can one over IPv4 at a server that has only IPv6. */
	if (is_client(flow) && is_mapped(&flow->ip) && !is_mapped(&ip))
		return 1;
	ip = flow->ip;
	write_ip6(ctx, &ip);
	ctx->user_port = flow->port;
	return 1;
}

SEC("cgroup/recvmsg4") int tsi_recvmsg4(struct bpf_sock_addr *ctx)
{
	return show4(ctx);
}

SEC("cgroup/recvmsg6") int tsi_recvmsg6(struct bpf_sock_addr *ctx)
{
	return show6(ctx);
}

SEC("cgroup/getpeername4") int tsi_getpeername4(struct bpf_sock_addr *ctx)
{
	return show4(ctx);
}

SEC("cgroup/getpeername6") int tsi_getpeername6(struct bpf_sock_addr *ctx)
{
	return show6(ctx);
}

/* ---- connection requests ------------------------------------------------------------------------ */

struct ip4_header {
	__u8 version_ihl, tos;
	__u16 len, ident, fragment;
	__u8 ttl, protocol;
	__u16 checksum;
	__u32 source, destination;
};

struct ip6_header {
	__u32 version_flow;
	__u16 len;
	__u8 next, hops;
	struct ip source, destination;
};

struct tcp_header {
	__u16 source, destination;
	__u32 sequence, acknowledgement;
	__u8 offset, flags;
};

#define TCP_SYN 0x02
#define TCP_ACK 0x10

static __always_inline bool report_syn(__u32 id, const struct flow *flow, struct __sk_buff *skb)
{
	struct syn_event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	__u32 len = skb->len;

	if (!event)
		return false;
	if (len > PACKET_MAX)
		len = PACKET_MAX;
	if (len == 0 || bpf_skb_load_bytes(skb, 0, event->packet, len) != 0)
		len = 0;
	event->kind = SYN;
	event->id = id;
	event->flow = *flow;
	event->packet_len = len;
	event->reserved = 0;
	bpf_ringbuf_submit(event, 0);
	return true;
}

/* Keeps a SYN for the agent until the host has answered. Everything else passes. */
SEC("cgroup_skb/egress") int tsi_egress(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	struct tcp_header *tcp;
	struct flow *flow;
	struct flow copy;
	__u32 id;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct ip4_header *ip = data;

		if ((void *)(ip + 1) > end || !is_flow4(ip->destination) ||
		    ip->protocol != IPPROTO_TCP || ip->version_ihl != 0x45)
			return 1;
		id = bpf_ntohl(ip->destination) & ~FLOW_MASK4;
		tcp = (void *)(ip + 1);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ip6_header *ip = data;

		if ((void *)(ip + 1) > end || ip->destination.word[0] != FLOW_NET6_0 ||
		    ip->next != IPPROTO_TCP)
			return 1;
		id = bpf_ntohl(ip->destination.word[3]) & ~FLOW_MASK4;
		tcp = (void *)(ip + 1);
	} else {
		return 1;
	}
	if ((void *)(tcp + 1) > end || (tcp->flags & (TCP_SYN | TCP_ACK)) != TCP_SYN ||
	    tcp->destination != AGENT_PORT)
		return 1;
	flow = bpf_map_lookup_elem(&flows, &id);
	/* One that nobody was redirected to: the agent refuses it. */
	if (!flow || flow->cookie != bpf_get_socket_cookie(skb) || flow->state == OPEN)
		return 1;
	if (flow->state == NEW) {
		copy = *flow;
		/* One that cannot be reported comes again. */
		if (report_syn(id, &copy, skb))
			flow->state = ASKED;
	}
	return 0;
}

/* ---- the end of sockets ------------------------------------------------------------------------- */

SEC("cgroup/sock_release") int tsi_release(struct bpf_sock *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	__u32 *id = bpf_map_lookup_elem(&sockets, &cookie);

	if (id) {
		end_flow(RELEASED, *id, cookie);
		bpf_map_delete_elem(&sockets, &cookie);
	}
	return 1;
}

char _license[] SEC("license") = "Apache-2.0";
