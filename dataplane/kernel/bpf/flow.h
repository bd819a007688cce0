/* What the endpoints of this host send, counted by addresses, protocol and the server's
 * port. Each direction is counted where it is sent. */
#pragma once

#include "vip.h"

#define NEXT_SCTP 132

/* pair is who sends what to whom. */
#define MAX_PAIRS 65536
struct pair {
	struct addr src;
	struct addr dst; /* behind a virtual address: the task's */
	__u32 link;      /* host's side of the sender's link: what the guard drops may lie in src */
	__u32 vip;       /* the virtual address that was asked, IPv4, or 0 */
	__be16 port;     /* the lower one of both, so that a server's clients are one; 0: none */
	__u8 protocol;
	__u8 verdict;
};

/* Verdicts: a reason of the guard, or one of these. */
#define VERDICT_FAST REASONS
#define VERDICT_SLOW (REASONS + 1)
#define VERDICT_LOST (REASONS + 2) /* dropped behind the guard: nobody is there at a virtual address */
#define VERDICT_LONG (REASONS + 3) /* longer than the network's MTU: the sender was told */
#define VERDICTS (REASONS + 4)

struct tally {
	__u64 packets; /* as on the wire: what is cut later counts as its pieces */
	__u64 bytes;
	__u64 first; /* CLOCK_MONOTONIC, to a tick of the kernel's clock */
	__u64 last;
	__u32 vni;
	__u32 zero;
};

struct total {
	__u64 packets;
	__u64 bytes;
};

/* One value for all processors: with one for each, a host of 128 of them would want
 * a third of a gigabyte. The longest unused go first. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_PAIRS);
	__type(key, struct pair);
	__type(value, struct tally);
	__uint(pinning, PINNED);
} weft_pairs SEC(".maps");

/* weft_totals, by verdict, only grow, whatever goes from weft_pairs. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, VERDICTS);
	__type(key, __u32);
	__type(value, struct total);
	__uint(pinning, PINNED);
} weft_totals SEC(".maps");

/* sent is a packet on its way through the program. */
struct sent {
	struct pair pair;
	__u32 vni;
	__u32 packets; /* 0: it is not counted */
	__u32 bytes;
};

/* look takes down what is sent, before anything changes it. */
static __always_inline void look(struct __sk_buff *skb, const struct settings *host, const struct port *p, struct sent *s)
{
	const __u32 headers = L3 + sizeof(struct ip6);
	__u32 offset = 0;
	struct ports ports;
	struct eth *eth;

	s->packets = 0;
	if (!(host->flags & HAS_FLOWS))
		return;
	if (!holds(skb, at(skb, 0), headers)) /* a packet socket may put them elsewhere */
		pull(skb, headers);
	eth = at(skb, 0);
	if (!holds(skb, eth, L3 + sizeof(struct ip4)))
		return;
	if (eth->type == ETH_IP4) {
		struct ip4 *ip = (void *)(eth + 1);

		map_ip4(&s->pair.src, ip->src);
		map_ip4(&s->pair.dst, ip->dst);
		s->pair.protocol = ip->next;
		if (!(ip->frag & IP4_OFFSET))
			offset = L3 + (ip->version_ihl & 15) * 4;
	} else if (eth->type == ETH_IP6) {
		struct ip6 *ip = (void *)(eth + 1);

		if (!holds(skb, ip, sizeof(*ip)))
			return;
		s->pair.src = ip->src;
		s->pair.dst = ip->dst;
		s->pair.protocol = ip->next;
		offset = L3 + sizeof(*ip);
	} else {
		return;
	}
	s->pair.link = skb->ifindex;
	s->pair.vip = 0;
	s->pair.port = 0;
	if (offset && (s->pair.protocol == NEXT_TCP || s->pair.protocol == NEXT_UDP || s->pair.protocol == NEXT_SCTP) &&
	    !bpf_skb_load_bytes(skb, offset, &ports, sizeof(ports)))
		s->pair.port = bpf_ntohs(ports.src) < bpf_ntohs(ports.dst) ? ports.src : ports.dst;
	s->vni = p->vni;
	s->bytes = skb->len;
	s->packets = skb->gso_segs ? skb->gso_segs : 1;
}

/* look_behind takes down the task that a packet to a virtual address goes to. */
static __always_inline void look_behind(struct __sk_buff *skb, struct sent *s)
{
	struct ip4 *ip = at(skb, L3);

	if (!s->packets || s->pair.dst.w[2] != bpf_htonl(0xffff) || !holds(skb, ip, sizeof(*ip)) || ip->dst == s->pair.dst.w[3])
		return;
	s->pair.vip = s->pair.dst.w[3];
	s->pair.dst.w[3] = ip->dst;
}

/* tally counts what became of it. */
static __always_inline void tally(struct sent *s, __u32 verdict)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	struct total *total;
	struct tally *t;

	if (!s->packets)
		return;
	total = bpf_map_lookup_elem(&weft_totals, &verdict);
	if (total) {
		total->packets += s->packets;
		total->bytes += s->bytes;
	}
	s->pair.verdict = verdict;
	t = bpf_map_lookup_elem(&weft_pairs, &s->pair);
	if (!t) {
		struct tally none = { .first = now, .vni = s->vni };

		/* Another processor may be faster. */
		bpf_map_update_elem(&weft_pairs, &s->pair, &none, BPF_NOEXIST);
		t = bpf_map_lookup_elem(&weft_pairs, &s->pair);
		if (!t)
			return;
	}
	__sync_fetch_and_add(&t->packets, s->packets);
	__sync_fetch_and_add(&t->bytes, s->bytes);
	t->last = now;
}
