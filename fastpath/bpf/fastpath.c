// The fast path: packets of flows that the host has just forwarded unchanged go directly to the interface through which
// the host sent the flow's last packet. See docs/fastpath.md.
//
//  ingress program (from_pod, from_node)            egress program (to_pod, to_node)
//  fresh record of the flow? -> redirect
//  otherwise: write a tag into the packet, and
//  leave it to the host  -----------> IP stack -----> is the tag that of the packet as it leaves?
//                                                     -> record the flow for one second
//
// The tag is a hash of what may not change on the way. It proves that the host forwarded this very packet and did not
// translate its addresses. A packet that netfilter drops never arrives at an egress program. So a record says what the
// host itself did with the flow less than a second ago.

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#define SEC(name) __attribute__((section(name), used))
#define INLINE static __attribute__((always_inline))
#define be16(x) __builtin_bswap16(x)
#define be32(x) __builtin_bswap32(x)

// The declarations of maps in the form that loaders read from the type information (BTF).
#define NUMBER(name, value) int (*name)[value]
#define TYPE(name, value) typeof(value) *name

static void *(*lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*update)(void *map, const void *key, const void *value, __u64 flags) = (void *)BPF_FUNC_map_update_elem;
// Advances with each tick of the kernel (4 ms or less often up to 10 ms), which is exact enough, and costs a fifth of the
// exact clock.
static __u64 (*now)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;
static long (*redirect)(__u32 interface, __u64 flags) = (void *)BPF_FUNC_redirect;
static long (*redirect_peer)(__u32 interface, __u64 flags) = (void *)BPF_FUNC_redirect_peer;
static long (*change_type)(struct __sk_buff *skb, __u32 type) = (void *)BPF_FUNC_skb_change_type;
static long (*pull)(struct __sk_buff *skb, __u32 length) = (void *)BPF_FUNC_skb_pull_data;
static long (*store)(struct __sk_buff *skb, __u32 offset, const void *from, __u32 length, __u64 flags) =
	(void *)BPF_FUNC_skb_store_bytes;

// How long a record is valid, in nanoseconds: a rule that is added while a flow is active applies within this time.
#define VALID 1000000000ull

// Kept in step with `Count` in src/lib.rs.
enum count {
	POD_TO_POD,   // fast
	POD_TO_NODE,  // fast
	NODE_TO_POD,  // fast
	NO_RECORD,    // normal: the flow is new, or the host translates its addresses
	EXPIRED,      // normal: one packet per second, and after a change of paths
	LARGER,       // normal: larger than every packet that the host forwarded in this second
	OTHER_SENDER, // normal: the record belongs to another interface
	CONTROL,      // normal: TCP SYN, FIN or RST
	FRAGMENT,     // normal
	OPTIONS,      // normal: IPv4 options or IPv6 extension headers
	PROTOCOL,     // normal: neither TCP nor UDP
	LAST_HOP,     // normal: the host answers with an ICMP error
	CHANGED,      // at the egress: the host has translated the packet
	RECORDED,     // at the egress
	COUNTS,
};

// An address in the form of IPv6. IPv4 addresses are mapped (::ffff:a.b.c.d).
struct address {
	__u32 words[4];
};

struct flow {
	struct address from, to;
	__u16 from_port, to_port;
	__u8 protocol;
	__u8 zero[3];
};

enum kind { TO_POD, TO_NODE };

// What the host did with the flow's last packet.
struct record {
	__u64 time;      // of that packet
	__u32 arrives;   // index of the interface on which the flow's packets arrive
	__u32 leaves;    // index of the interface through which they leave
	__u32 largest;   // length of the largest that has passed, with its IP header, in bytes
	__u32 mark;
	__u32 priority;
	__u32 kind;
	__u8 addresses[2 * ETH_ALEN]; // the destination and the source in its Ethernet header
	__u32 generation;
};

struct {
	NUMBER(type, BPF_MAP_TYPE_LRU_HASH);
	NUMBER(max_entries, 65536);
	TYPE(key, struct flow);
	TYPE(value, struct record);
} flows SEC(".maps");

// The index of the host's interface of each local pod, by the pod's address.
struct {
	NUMBER(type, BPF_MAP_TYPE_HASH);
	NUMBER(max_entries, 16384);
	NUMBER(map_flags, BPF_F_NO_PREALLOC);
	TYPE(key, struct address);
	TYPE(value, __u32);
} pods SEC(".maps");

// One number. Records of earlier generations are not valid: the agent adds one when it changes paths.
struct {
	NUMBER(type, BPF_MAP_TYPE_ARRAY);
	NUMBER(max_entries, 1);
	TYPE(key, __u32);
	TYPE(value, __u32);
} generation SEC(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	NUMBER(max_entries, COUNTS);
	TYPE(key, __u32);
	TYPE(value, __u64);
} counters SEC(".maps");

INLINE __u32 current_generation(void)
{
	__u32 only = 0;
	__u32 *found = lookup(&generation, &only);
	return found ? *found : 0;
}

INLINE void add_one(__u32 what)
{
	__u64 *counter = lookup(&counters, &what);
	if (counter)
		(*counter)++;
}

// A packet that can belong to a recorded flow.
struct packet {
	struct flow flow;
	__u32 length; // with its IP header, in bytes; of each segment if it is to be segmented
	__u32 hops;   // time to live or hop limit
	__u32 class;  // type of service or traffic class
};

#define MORE_FRAGMENTS_OR_OFFSET 0x3fff

// The ports and the length of the header of TCP or UDP at `offset`. Returns a count if the packet takes the normal path.
INLINE int parse_transport(struct __sk_buff *skb, __u32 offset, struct packet *packet)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 header = sizeof(struct udphdr);
	if (packet->flow.protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = data + offset;
		if ((void *)(tcp + 1) > end)
			return PROTOCOL;
		if (tcp->syn || tcp->fin || tcp->rst)
			return CONTROL;
		packet->flow.from_port = tcp->source;
		packet->flow.to_port = tcp->dest;
		header = tcp->doff * 4;
	} else if (packet->flow.protocol == IPPROTO_UDP) {
		struct udphdr *udp = data + offset;
		if ((void *)(udp + 1) > end)
			return PROTOCOL;
		packet->flow.from_port = udp->source;
		packet->flow.to_port = udp->dest;
	} else {
		return PROTOCOL;
	}
	packet->length = skb->gso_size ? skb->gso_size + offset - ETH_HLEN + header : skb->len - ETH_HLEN;
	return -1;
}

// Makes the first bytes of the packet readable, or all of a shorter one.
INLINE void make_readable(struct __sk_buff *skb, __u32 length)
{
	if ((void *)(long)skb->data + length > (void *)(long)skb->data_end)
		pull(skb, skb->len < length ? skb->len : length);
}

INLINE int parse_ipv4(struct __sk_buff *skb, struct packet *packet)
{
	make_readable(skb, ETH_HLEN + sizeof(struct iphdr) + sizeof(struct tcphdr));
	struct iphdr *ip = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return PROTOCOL;
	if (ip->ihl != 5)
		return OPTIONS;
	if (ip->frag_off & be16(MORE_FRAGMENTS_OR_OFFSET))
		return FRAGMENT;
	packet->flow.from.words[2] = be32(0xffff);
	packet->flow.from.words[3] = ip->saddr;
	packet->flow.to.words[2] = be32(0xffff);
	packet->flow.to.words[3] = ip->daddr;
	packet->flow.protocol = ip->protocol;
	packet->hops = ip->ttl;
	packet->class = ip->tos;
	return parse_transport(skb, ETH_HLEN + sizeof(*ip), packet);
}

INLINE int parse_ipv6(struct __sk_buff *skb, struct packet *packet)
{
	make_readable(skb, ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct tcphdr));
	struct ipv6hdr *ip = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return PROTOCOL;
	switch (ip->nexthdr) {
	case IPPROTO_FRAGMENT:
		return FRAGMENT;
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
		return OPTIONS;
	}
	__builtin_memcpy(&packet->flow.from, &ip->saddr, sizeof(struct address));
	__builtin_memcpy(&packet->flow.to, &ip->daddr, sizeof(struct address));
	packet->flow.protocol = ip->nexthdr;
	packet->hops = ip->hop_limit;
	packet->class = be32(*(__u32 *)ip) >> 20 & 0xff;
	return parse_transport(skb, ETH_HLEN + sizeof(*ip), packet);
}

// Returns a count if the packet takes the normal path, otherwise a negative number.
INLINE int parse(struct __sk_buff *skb, struct packet *packet)
{
	// A frame of another VLAN belongs to another interface.
	if (skb->vlan_present)
		return PROTOCOL;
	if (skb->protocol == be16(ETH_P_IP))
		return parse_ipv4(skb, packet);
	if (skb->protocol == be16(ETH_P_IPV6))
		return parse_ipv6(skb, packet);
	return PROTOCOL;
}

// The tag of a packet that arrived with these hops, in this generation: not 0.
INLINE __u32 tag(const struct packet *packet, __u32 hops, __u32 generation)
{
	const __u32 *words = (const __u32 *)&packet->flow;
	__u32 hash = generation << 16 ^ packet->class << 8 ^ hops;
#pragma unroll
	for (int i = 0; i < sizeof(struct flow) / sizeof(__u32); i++) {
		hash = (hash ^ words[i]) * 0x9e3779b1;
		hash ^= hash >> 15;
	}
	return (hash & 0xffff) ?: 1;
}

#define HOP_LIMIT (ETH_HLEN + __builtin_offsetof(struct ipv6hdr, hop_limit))

// Does what the host would do when it forwards the packet: Ethernet addresses and hops. Returns 0 if it is done.
INLINE int rewrite(struct __sk_buff *skb, const struct packet *packet, const struct record *record)
{
	void *data = (void *)(long)skb->data;
	struct iphdr *ip = data + ETH_HLEN;
	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return 1;
	__builtin_memcpy(data, record->addresses, sizeof(record->addresses));
	if (skb->protocol == be16(ETH_P_IP)) {
		// One less in the upper byte of its word (RFC 1141). The sum of the header stays the same, and with it a
		// checksum of the whole packet by the network card.
		__u32 sum = ip->check + be16(0x0100);
		ip->check = sum + (sum >= 0xffff);
		ip->ttl--;
		return 0;
	}
	__u8 hops = packet->hops - 1;
	return store(skb, HOP_LIMIT, &hops, sizeof(hops), BPF_F_RECOMPUTE_CSUM);
}

// TC_ACT_UNSPEC, not TC_ACT_OK: the filters of other programs on the interface are not skipped.
#define NORMAL_PATH TC_ACT_UNSPEC

enum origin { FROM_POD, FROM_NODE };

INLINE int normal(const struct packet *packet, enum origin origin, int reason)
{
	// Most packets from other nodes are not for pods. Whether they are was not looked up for a packet that was not parsed.
	if (origin == FROM_POD || (reason < CONTROL && lookup(&pods, &packet->flow.to)))
		add_one(reason);
	return NORMAL_PATH;
}

INLINE int arrive(struct __sk_buff *skb, enum origin origin)
{
	struct packet packet = {};
	// Only these programs write it: a packet of the fast path must not be recorded, or no record would expire.
	skb->tc_index = 0;
	int reason = parse(skb, &packet);
	if (reason >= 0)
		return normal(&packet, origin, reason);
	if (packet.hops <= 1)
		return normal(&packet, origin, LAST_HOP);
	__u32 generation = current_generation();
	struct record *record = lookup(&flows, &packet.flow);
	if (!record)
		reason = NO_RECORD;
	else if (record->arrives != skb->ifindex)
		reason = OTHER_SENDER;
	else if (record->generation != generation || now() - record->time > VALID)
		reason = EXPIRED;
	else if (packet.length > record->largest)
		reason = LARGER;
	if (!record || reason >= 0) {
		skb->tc_index = tag(&packet, packet.hops, generation);
		return normal(&packet, origin, reason);
	}
	if (rewrite(skb, &packet, record))
		return NORMAL_PATH;
	if (record->kind == TO_POD) {
		add_one(origin == FROM_POD ? POD_TO_POD : NODE_TO_POD);
		// A frame to the bridge is not for the interface on which it arrives. Linux before 6.15 keeps that.
		if (skb->pkt_type)
			change_type(skb, 0 /* PACKET_HOST */);
		return redirect_peer(record->leaves, 0);
	}
	add_one(POD_TO_NODE);
	skb->mark = record->mark;
	skb->priority = record->priority;
	return redirect(record->leaves, 0);
}

INLINE int leave(struct __sk_buff *skb, enum kind kind)
{
	__u32 found = skb->tc_index;
	// Sent by the host itself, arrived elsewhere, or on the fast path.
	if (!found)
		return NORMAL_PATH;
	skb->tc_index = 0;
	struct packet packet = {};
	__u32 generation = current_generation();
	// With the tag of an earlier generation, it may leave on an earlier path.
	if (parse(skb, &packet) >= 0 || found != tag(&packet, packet.hops + 1, generation)) {
		add_one(CHANGED);
		return NORMAL_PATH;
	}
	__u32 arrives = skb->ingress_ifindex;
	// A bridged packet has arrived on the bridge, so the pod's port is found by its address. The packet filter has
	// checked that the pod may use it.
	__u32 *port = lookup(&pods, &packet.flow.from);
	// Only pods' flows: what the host forwards for others is not Polder's.
	if (!port && kind == TO_NODE)
		return NORMAL_PATH;
	if (port)
		arrives = *port;
	__u64 time = now();
	struct record *known = lookup(&flows, &packet.flow);
	if (known && known->generation == generation && time - known->time <= VALID && known->arrives == arrives &&
	    known->leaves == skb->ifindex) {
		// Not its time: every part of a record is at most as old as its time says.
		if (packet.length > known->largest)
			known->largest = packet.length;
		return NORMAL_PATH;
	}
	struct record record = {
		.time = time,
		.arrives = arrives,
		.leaves = skb->ifindex,
		.largest = packet.length,
		.mark = skb->mark,
		.priority = skb->priority,
		.kind = kind,
		.generation = generation,
	};
	void *data = (void *)(long)skb->data;
	if (data + sizeof(record.addresses) > (void *)(long)skb->data_end)
		return NORMAL_PATH;
	__builtin_memcpy(record.addresses, data, sizeof(record.addresses));
	update(&flows, &packet.flow, &record, BPF_ANY);
	add_one(RECORDED);
	return NORMAL_PATH;
}

SEC("classifier/from_pod") int from_pod(struct __sk_buff *skb)
{
	return arrive(skb, FROM_POD);
}

SEC("classifier/from_node") int from_node(struct __sk_buff *skb)
{
	return arrive(skb, FROM_NODE);
}

SEC("classifier/to_pod") int to_pod(struct __sk_buff *skb)
{
	return leave(skb, TO_POD);
}

SEC("classifier/to_node") int to_node(struct __sk_buff *skb)
{
	return leave(skb, TO_NODE);
}

// No helper that these programs call is limited to programs under the GPL.
char terms[] SEC("license") = "Apache-2.0";
