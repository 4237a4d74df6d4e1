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
 *
 * Each start has the kernel verify and compile all of this, which costs thousands of instructions for each one here:
 * what can be looked up is in a map, what two structures have in common is one, and a condition of several parts is
 * one comparison where that is shorter, since each branch makes the verifier walk all that follows again.
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

/* These and the layout of the structures: guest/src/tsi/program.rs and destinations.rs. */
#define AGENT_PORT bpf_htons(1)
#define CLIENT_PORT bpf_htons(2) /* of its connections for clients of published ports */
#define DNS_PORT bpf_htons(53)
#define FLOW_NET4 0x7f800000
#define FLOW_MASK4 0xffc00000
#define FLOW_NET6_0 bpf_htonl(0xfd545349)
/* Ids have 22 bits; the top two say whose they are. */
#define ID_BITS 20
#define ID_BIT (1 << (ID_BITS - 1)) /* set in all that are given out here: 0 is no id */
#define KIND_CONNECTED 0
#define KIND_DATAGRAM (1 << ID_BITS)
#define KIND_PUBLISHED (2 << ID_BITS) /* made by the agent */

/* The host has 3,072 connections at once; beside those there are sockets that are ending, and UDP's. A table has
 * as many buckets, and each is set up at the start. */
#define CONNECTED_MAX 8192
#define DATAGRAM_MAX 4096
#define EVENTS_LEN (256 * 1024)
#define PREFIXES_MAX 8192 /* the policy's, and some that are always there */
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

/* Two words of an address at once, where it is aligned for that. */
typedef __u64 __attribute__((may_alias)) half;

/* Whom a server answers. */
struct client_key {
	struct ip ip;
	__u16 port;        /* big-endian */
	__u16 server_port; /* big-endian */
};

enum event_kind {
	SYN,
	RELEASED, /* a socket was closed */
	REPLACED, /* a socket has a new flow in this one's place */
	REFUSED,  /* a datagram, by what the host has said beforehand */
	LISTENS,  /* a socket waits for connections from now on */
	LISTENED, /* a socket does not any more */
};

/* Of a socket that listens. */
struct listen_event {
	__u32 kind;
	__u32 port; /* in the machine's order */
	struct ip ip;
};

#define PACKET_MAX 128 /* IPv6 and TCP headers with all their options; a power of two, for report_syn() */

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

/* Key of a trie. */
struct prefix {
	__u32 len;
	struct ip ip;
};

/* Where a socket wants to go: as a prefix first, then as the flow that it gets, and in the event that says that it does
 * not. */
struct request {
	__u32 event_kind;
	__u32 event_reserved;
	union {
		struct flow flow;
		struct {
			__u32 reserved;
			struct prefix prefix;
		};
		half halves[4];
	};
};

enum kind {
	INSIDE,   /* the box's own, or nowhere: none of ours */
	OUTSIDE,  /* carried */
	FLOW,     /* the addresses that name flows */
	RESOLVER, /* a loopback address of resolv.conf; or, of a box that shares the host's, any */
};

struct destination {
	__u32 kind;
	__u32 refused;   /* 0 or 1: whether the host carries no datagrams to there */
	__u64 except[2]; /* ports at which it is the other way round, four in each, big-endian; or 0 */
};

_Static_assert(sizeof(struct flow) == 32 && sizeof(struct syn_event) == 176 &&
		       sizeof(struct end_event) == 16 && sizeof(struct request) == 40 &&
		       sizeof(struct listen_event) == 24 &&
		       sizeof(struct destination) == 24 &&
		       offsetof(struct request, prefix.ip) == offsetof(struct request, flow.ip),
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
/* socket -> id, of connected sockets; 0 for one that has only sent datagrams */
MAP(sockets, SK_STORAGE, sizeof(__u32), sizeof(__u32), 0, BPF_F_NO_PREALLOC);
/* The same two for datagrams of sockets that are not connected: id -> flow, flow as it begins -> id. What is not used is
 * forgotten. */
MAP(datagram_flows, LRU_HASH, sizeof(__u32), sizeof(struct flow), DATAGRAM_MAX, 0);
MAP(datagram_ids, LRU_HASH, sizeof(struct flow), sizeof(__u32), DATAGRAM_MAX, 0);
#ifdef WITH_CLIENTS
#define HAS_CLIENTS true
/* client -> id, of clients of published UDP ports, by the agent */
MAP(clients, HASH, sizeof(struct client_key), sizeof(__u32), CLIENTS_MAX, BPF_F_NO_PREALLOC);
#else
#define HAS_CLIENTS false
#endif
/* what becomes of what is sent to a prefix; the agent fills it (guest/src/tsi/destinations.rs) */
MAP(destinations, LPM_TRIE, sizeof(struct prefix), sizeof(struct destination), PREFIXES_MAX, BPF_F_NO_PREALLOC);
/* for the agent */
MAP(events, RINGBUF, 0, 0, EVENTS_LEN, 0);

/* last number given out, of ids of connected sockets and of datagrams */
__u32 last_connected, last_datagram;

/* ---- addresses -------------------------------------------------------------------------------- */

static __always_inline bool is_mapped(const struct ip *ip)
{
	return (ip->word[0] | ip->word[1] | (ip->word[2] ^ bpf_htonl(0xffff))) == 0;
}

static __always_inline bool is_flow4(__u32 ip4)
{
	return (ip4 & bpf_htonl(FLOW_MASK4)) == bpf_htonl(FLOW_NET4);
}

static __always_inline __u32 id_of4(__u32 ip4)
{
	return bpf_ntohl(ip4) & ~FLOW_MASK4;
}

/* Whether it names a flow, by its last word as IPv4's do, or by the three before. */
static __always_inline bool is_flow(const struct ip *ip)
{
	return (is_mapped(ip) && is_flow4(ip->word[3])) ||
	       ((ip->word[0] ^ FLOW_NET6_0) | ip->word[1] | ip->word[2]) == 0;
}

/* Only its name servers are somebody else's at a box's loopback, unless it shares that of the host. */
#ifdef WITH_LISTENERS
#define SHARES_LOOPBACK true
#else
#define SHARES_LOOPBACK false
#endif

#ifdef WITH_RESOLVERS
/* Whether somebody in the guest plays a resolver of resolv.conf, or any other server of the host's loopback. */
static __always_inline bool is_played(struct bpf_sock_addr *ctx, bool connect, bool ip6, const struct ip *ip)
{
	struct bpf_sock_tuple tuple;
	struct bpf_sock *server;
	__u32 len;

	if (!SHARES_LOOPBACK && ctx->user_port != DNS_PORT)
		return true;
	if (!ip6 || (connect && is_mapped(ip))) {
		tuple.ipv4.daddr = ip->word[3];
		tuple.ipv4.saddr = bpf_htonl(0x7f000001);
		tuple.ipv4.dport = ctx->user_port;
		tuple.ipv4.sport = AGENT_PORT;
		len = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.daddr, ip, sizeof(*ip));
		__builtin_memcpy(tuple.ipv6.saddr, ip, sizeof(*ip));
		tuple.ipv6.dport = ctx->user_port;
		tuple.ipv6.sport = AGENT_PORT;
		len = sizeof(tuple.ipv6);
	}
	if (!connect || ctx->protocol == IPPROTO_UDP)
		server = bpf_sk_lookup_udp(ctx, &tuple, len, BPF_F_CURRENT_NETNS, 0);
	else
		server = bpf_sk_lookup_tcp(ctx, &tuple, len, BPF_F_CURRENT_NETNS, 0);
	if (server)
		bpf_sk_release(server);
	return server;
}
#else
/* Not every resolv.conf names one, and to verify this costs a start: the agent loads these programs with it only
 * if it does. */
static __always_inline bool is_played(const struct bpf_sock_addr *ctx, bool connect, bool ip6, const struct ip *ip)
{
	(void)ctx;
	(void)connect;
	(void)ip6;
	(void)ip;
	return false; /* there is none */
}
#endif

/* Other network namespaces have a loopback of their own. */
static __always_inline bool is_of_box(struct bpf_sock_addr *ctx)
{
	return bpf_get_netns_cookie(ctx) == bpf_get_netns_cookie(NULL);
}

/* Of a destination outside, or a resolver's. Only datagrams are sent without being connected. */
static __always_inline bool is_carried(struct bpf_sock_addr *ctx, bool connect, bool ip6, __u32 kind,
					const struct ip *ip)
{
	__u32 tcp = connect ? ctx->protocol ^ IPPROTO_TCP : 1;

	if (HAS_OWN_NETWORK || tcp * (ctx->protocol ^ IPPROTO_UDP) != 0)
		return false;
	return kind != RESOLVER || !is_played(ctx, connect, ip6, ip);
}

/* ---- ids ---------------------------------------------------------------------------------------- */

/* Files a flow under an id of its own. Ids come round: those of sockets that are still there are
 * passed over. 0: there is none, which is no id. */
static __always_inline __u32 new_id(void *map, __u32 kind, __u32 *last, const struct flow *flow)
{
	__u32 number = __sync_fetch_and_add(last, 1);

#pragma clang loop unroll(disable)
	for (int i = 0; i < 4; i++) {
		__u32 id = kind | ID_BIT | (number & (ID_BIT - 1));

		if (bpf_map_update_elem(map, &id, flow, BPF_NOEXIST) == 0)
			return id;
		/* Past a run of those that are taken. */
		number = bpf_get_prandom_u32();
	}
	return 0;
}

static __always_inline int refuse(int error)
{
	bpf_set_retval(-error);
	return 0;
}

/* A flow has lost its socket. The agent forgets it, once it has read the datagrams that there may be. */
static __always_inline void end_flow(__u32 kind, __u32 id, __u64 cookie)
{
	struct end_event event = { .kind = kind, .id = id, .cookie = cookie };

	if (bpf_ringbuf_output(&events, &event, sizeof(event), 0) != 0)
		bpf_map_delete_elem(&flows, &event.id);
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
static __always_inline __u32 connect_flow(struct bpf_sock_addr *ctx, const struct flow *flow, __u32 client)
{
	__u32 *id = bpf_sk_storage_get(&sockets, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);

	if (!id)
		return 0;
	if (*id)
		end_flow(REPLACED, *id, flow->cookie);
	/* A client's flow ends when the host says so. */
	*id = client ? 0 : new_id(&flows, KIND_CONNECTED, &last_connected, flow);
	return client ? client : *id;
}

/* Whether the host has said beforehand that it carries no datagrams to there. Nothing else tells a socket that is
 * not connected of the first one: the host answers when it has been sent. */
static __always_inline bool is_refused(const struct destination *destination, __u32 port)
{
	const __u64 ones = 0x0001000100010001;
	__u64 ports = port * ones;
	__u64 low = destination->except[0] ^ ports, high = destination->except[1] ^ ports;

	/* The top bit of a quarter that is 0, and maybe of those above: what to subtract from is borrowed there. */
	low = (low - ones) & ~low;
	high = (high - ones) & ~high;
	return (((low | high) & ones << 15) != 0) != destination->refused;
}

/* sendto(): the socket has a flow per destination. 0: there is none, for this reason. */
static __always_inline __u32 datagram_flow(struct bpf_sock_addr *ctx, struct request *request,
					   const struct destination *destination, int *why)
{
	const struct flow *flow = &request->flow;
	__u32 *known = bpf_map_lookup_elem(&datagram_ids, flow);
	struct flow *old;
	__u32 id;

	/* Looking it up keeps it from being forgotten. An error is told once, like a socket's own: no ICMP tells a
	 * socket that is not connected. */
	if (known && (old = bpf_map_lookup_elem(&datagram_flows, known))) {
		*why = old->error;
		old->error = 0;
		return *why ? 0 : *known;
	}
	if (is_refused(destination, flow->port)) {
		request->event_kind = REFUSED;
		request->event_reserved = 0;
		/* For the host to count. */
		bpf_ringbuf_output(&events, request, sizeof(*request), 0);
		*why = EHOSTUNREACH;
		return 0;
	}
	*why = ENOBUFS;
	id = new_id(&datagram_flows, KIND_DATAGRAM, &last_datagram, flow);
	if (!id)
		return 0;
	bpf_map_update_elem(&datagram_ids, flow, &id, BPF_ANY);
	/* So that its end is told. */
	bpf_sk_storage_get(&sockets, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	return id;
}

/* ---- destinations -------------------------------------------------------------------------------
 *
 * Addresses that name flows are for the agent and these programs alone: nobody in the box may connect to one
 * or send to it, which would be another socket's flow, nor bind to one, and pose as somebody outside. */

static __always_inline void read_ip6(struct ip *ip, const struct bpf_sock_addr *ctx)
{
	const volatile half *from = (const volatile half *)ctx->user_ip6;
	half *to = (half *)ip;

	to[0] = from[0];
	to[1] = from[1];
}

static __always_inline void write_ip6(struct bpf_sock_addr *ctx, __u64 first, __u64 last)
{
	volatile half *to = (volatile half *)ctx->user_ip6;

	to[0] = first;
	to[1] = last;
}

/* An application names a flow: only its own, as the kernel does for what connected sockets with IPv4-mapped addresses
 * send, or that of a client whom it serves and who cannot be shown. */
static __always_inline bool may_name_flow(struct bpf_sock_addr *ctx, bool own, __u32 id)
{
	struct flow *flow;

	if (!own && !HAS_CLIENTS)
		return false;
	flow = bpf_map_lookup_elem(&flows, &id);
	return flow && ((own && flow->cookie == bpf_get_socket_cookie(ctx)) || is_server(ctx, flow));
}

/* The agent's port for a flow's packets. */
static __always_inline __u32 agents_port(__u32 id)
{
	_Static_assert(CLIENT_PORT == AGENT_PORT << 1, "by the bit that says which it is");
	return (__u32)AGENT_PORT << (id >> (ID_BITS + 1) & 1);
}

/* The same where an application sends: to clients only if there are any. */
static __always_inline __u32 port_for(__u32 id)
{
	return HAS_CLIENTS ? agents_port(id) : AGENT_PORT;
}

/* The id of the flow for what is sent to the request's address. 0: there is none, and this is the program's result. */
static __always_inline __u32 flow_for(struct bpf_sock_addr *ctx, struct request *request, bool connect, bool ip6,
				      int *result)
{
	struct destination *destination;
	struct flow *flow = &request->flow;
	__u32 client = client_of(ctx, &flow->ip);
	int why = ENOBUFS;
	__u32 id;

	*result = 1;
	request->prefix.len = 128;
	destination = bpf_map_lookup_elem(&destinations, &request->prefix);
	if (!client) {
		if (!destination || destination->kind == INSIDE || !is_of_box(ctx))
			return 0;
		if (destination->kind == FLOW) {
			if (!may_name_flow(ctx, !connect && !ip6, id_of4(flow->ip.word[3])))
				*result = refuse(ECONNREFUSED);
			return 0;
		}
		if (!is_carried(ctx, connect, ip6, destination->kind, &flow->ip))
			return 0;
	}
	flow->cookie = bpf_get_socket_cookie(ctx);
	/* Port and protocol; state (NEW), error and the server's port are 0. */
	request->halves[3] = ctx->user_port | (connect ? ctx->protocol : IPPROTO_UDP) << 16;
	if (connect)
		id = connect_flow(ctx, flow, client);
	else if (client)
		id = client;
	else
		id = destination ? datagram_flow(ctx, request, destination, &why) : 0;
	if (!id)
		*result = refuse(why);
	return id;
}

static __always_inline int send4(struct bpf_sock_addr *ctx, bool connect)
{
	struct request request;
	int result;
	__u32 id;

	((half *)&request.flow.ip)[0] = 0;
	request.flow.ip.word[2] = bpf_htonl(0xffff);
	request.flow.ip.word[3] = ctx->user_ip4;
	id = flow_for(ctx, &request, connect, false, &result);
	if (!id)
		return result;
	ctx->user_ip4 = bpf_htonl(FLOW_NET4 | id);
	ctx->user_port = port_for(id);
	return 1;
}

static __always_inline int send6(struct bpf_sock_addr *ctx, bool connect)
{
	struct request request;
	int result;
	__u32 id;

	read_ip6(&request.flow.ip, ctx);
	id = flow_for(ctx, &request, connect, true, &result);
	if (!id)
		return result;
	/* The kernel sends to an IPv4-mapped address as to one of IPv4's. */
	if (connect && is_mapped(&request.flow.ip))
		ctx->user_ip6[3] = bpf_htonl(FLOW_NET4 | id);
	else
		write_ip6(ctx, FLOW_NET6_0, (__u64)bpf_htonl(id) << 32);
	ctx->user_port = port_for(id);
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
	struct ip ip;

	read_ip6(&ip, ctx);
	return is_flow(&ip) ? refuse(EADDRNOTAVAIL) : 1;
}

/* ---- sources and peers --------------------------------------------------------------------------
 *
 * An address that names a flow counts only with a port of the agent's, which ordinary users cannot have: any
 * program may send from it by IP_PKTINFO. */

/* Only datagrams come from whom the socket has not connected to. */
static __always_inline struct flow *find(__u32 id, bool datagrams)
{
	if (datagrams && id & KIND_DATAGRAM)
		return bpf_map_lookup_elem(&datagram_flows, &id);
	return bpf_map_lookup_elem(&flows, &id);
}

static __always_inline int show4(struct bpf_sock_addr *ctx, bool datagrams)
{
	struct flow *flow;

	if (!is_flow4(ctx->user_ip4) || ctx->user_port != agents_port(bpf_ntohl(ctx->user_ip4)))
		return 1;
	flow = find(id_of4(ctx->user_ip4), datagrams);
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

static __always_inline int show6(struct bpf_sock_addr *ctx, bool datagrams)
{
	struct flow *flow;
	struct ip ip;
	half *to_show;
	__u32 id;

	read_ip6(&ip, ctx);
	id = id_of4(ip.word[3]);
	if (!is_flow(&ip) || ctx->user_port != agents_port(id))
		return 1;
	flow = find(id, datagrams);
	if (!flow)
		return 1;
	/* Nor can one over IPv4 at a server that has only IPv6. */
	if (is_client(flow) && is_mapped(&flow->ip) && !is_mapped(&ip))
		return 1;
	to_show = (half *)&flow->ip;
	write_ip6(ctx, to_show[0], to_show[1]);
	ctx->user_port = flow->port;
	return 1;
}

SEC("cgroup/recvmsg4") int tsi_recvmsg4(struct bpf_sock_addr *ctx)
{
	return show4(ctx, true);
}

SEC("cgroup/recvmsg6") int tsi_recvmsg6(struct bpf_sock_addr *ctx)
{
	return show6(ctx, true);
}

SEC("cgroup/getpeername4") int tsi_getpeername4(struct bpf_sock_addr *ctx)
{
	return show4(ctx, false);
}

SEC("cgroup/getpeername6") int tsi_getpeername6(struct bpf_sock_addr *ctx)
{
	return show6(ctx, false);
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
	/* It is not empty, which the verifier cannot know. */
	len = ((len - 1) & (PACKET_MAX - 1)) + 1;
	bpf_skb_load_bytes(skb, 0, event->packet, len);
	event->kind = SYN;
	event->id = id;
	event->flow = *flow;
	event->packet_len = len;
	bpf_ringbuf_submit(event, 0);
	return true;
}

/* What is not 0 if a packet is none of ours. */
static __always_inline __u32 no_request(const struct tcp_header *tcp, __u32 protocol)
{
	return (protocol ^ IPPROTO_TCP) | ((tcp->flags & (TCP_SYN | TCP_ACK)) ^ TCP_SYN) |
	       (tcp->destination ^ AGENT_PORT);
}

/* Keeps a SYN for the agent until the host has answered. Everything else passes. */
SEC("cgroup_skb/egress") int tsi_egress(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	struct flow *flow;
	__u32 other, id;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct ip4_header *ip = data;
		struct tcp_header *tcp = (void *)(ip + 1);

		if ((void *)(tcp + 1) > end)
			return 1;
		id = ip->destination;
		other = ((id & bpf_htonl(FLOW_MASK4)) ^ bpf_htonl(FLOW_NET4)) | (ip->version_ihl ^ 0x45) |
			no_request(tcp, ip->protocol);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ip6_header *ip = data;
		struct tcp_header *tcp = (void *)(ip + 1);

		if ((void *)(tcp + 1) > end)
			return 1;
		id = ip->destination.word[3];
		other = (ip->destination.word[0] ^ FLOW_NET6_0) | no_request(tcp, ip->next);
	} else {
		return 1;
	}
	if (other)
		return 1;
	id = id_of4(id);
	flow = bpf_map_lookup_elem(&flows, &id);
	/* One that nobody was redirected to: the agent refuses it. */
	if (!flow || flow->cookie != bpf_get_socket_cookie(skb) || flow->state == OPEN)
		return 1;
	/* One that cannot be reported comes again. */
	if (flow->state == NEW && report_syn(id, flow, skb))
		flow->state = ASKED;
	return 0;
}

/* ---- the end of sockets ------------------------------------------------------------------------- */

SEC("cgroup/sock_release") int tsi_release(struct bpf_sock *ctx)
{
	__u32 *id = bpf_sk_storage_get(&sockets, ctx, NULL, 0);

	if (id)
		end_flow(RELEASED, *id, bpf_get_socket_cookie(ctx));
	return 1;
}

/* ---- servers ------------------------------------------------------------------------------------ */

#ifdef WITH_LISTENERS
SEC("sockops") int tsi_listen(struct bpf_sock_ops *ctx)
{
	/* Each read where it is written: the verifier takes no address that depends on the family. */
	const volatile struct bpf_sock_ops *of = ctx;
	__u32 ip4 = of->local_ip4;
	struct listen_event event = {
		.port = ctx->local_port,
		.ip.word = { of->local_ip6[0], of->local_ip6[1], of->local_ip6[2], of->local_ip6[3] },
	};

	if (ctx->op == BPF_SOCK_OPS_TCP_LISTEN_CB) {
		event.kind = LISTENS;
		/* Else nothing tells of its end. */
		bpf_sock_ops_cb_flags_set(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
	} else if (ctx->op == BPF_SOCK_OPS_STATE_CB && ctx->args[0] == BPF_TCP_LISTEN) {
		event.kind = LISTENED;
	} else {
		return 1;
	}
	if (bpf_get_netns_cookie(ctx) != bpf_get_netns_cookie(NULL))
		return 1;
	if (ctx->family == AF_INET) {
		event.ip.word[0] = event.ip.word[1] = 0;
		event.ip.word[2] = bpf_htonl(0xffff);
		event.ip.word[3] = ip4;
	}
	bpf_ringbuf_output(&events, &event, sizeof(event), 0);
	return 1;
}
#endif

char _license[] SEC("license") = "Apache-2.0";
