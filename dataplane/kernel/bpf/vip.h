/* Virtual addresses of services, IPv4. The client's host chooses a task for each flow,
 * and the flow keeps it: packets to the virtual address get the task's, and its answers
 * get the virtual address back. The client's address stays. */
#pragma once

#include <linux/pkt_cls.h>
#include "packet.h"

struct ports {
	__be16 src;
	__be16 dst;
};

struct tcp { /* RFC 9293 */
	struct ports ports;
	__be32 seq;
	__be32 ack;
	__u8 offset;
	__u8 flags;
	__be16 window;
	__u16 sum;
	__be16 urgent;
};
#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

#define L3 (sizeof(struct eth))
#define L4 (L3 + sizeof(struct ip4))

/* part_of fills the key of a fragment of an IPv4 packet. Zero: it is none. */
#define FIRST_PART 1
#define NEXT_PART 2
static __always_inline int part_of(struct __sk_buff *skb, __u32 vni, struct part *k)
{
	struct ip4 *ip = at(skb, L3);

	if (!holds(skb, ip, sizeof(*ip)) || ip->version_ihl != 0x45 || !(ip->frag & IP4_PART))
		return 0;
	k->vni = vni;
	k->src = ip->src;
	k->dst = ip->dst;
	k->id = ip->id;
	k->proto = ip->next;
	return ip->frag & IP4_OFFSET ? NEXT_PART : FIRST_PART;
}

/* flow_of fills the key of an IPv4 packet's flow. Zero: it has none that is translated. */
static __always_inline int flow_of(struct __sk_buff *skb, __u32 vni, struct flow *f)
{
	struct ip4 *ip = at(skb, L3);
	struct ports *p;

	if (!holds(skb, ip, sizeof(*ip) + 8) || ip->version_ihl != 0x45 || (ip->frag & IP4_OFFSET))
		return 0;
	p = (void *)(ip + 1);
	f->vni = vni;
	f->src = ip->src;
	f->dst = ip->dst;
	f->proto = ip->next;
	switch (ip->next) {
	case NEXT_TCP:
	case NEXT_UDP:
		f->sport = p->src;
		f->dport = p->dst;
		return 1;
	case NEXT_ICMP: {
		__u8 type = *(__u8 *)p;

		if (type != 8 && type != 0) /* echo, and its answer */
			return 0;
		f->sport = ((struct ports *)((void *)p + 4))->src; /* identifier */
		f->dport = 0;
		return 1;
	}
	}
	return 0;
}

/* rewrite puts another address in place of the one at offset, and mends the sums. proto is
 * zero for what has no header of its own: a next fragment. */
static __always_inline int rewrite(struct __sk_buff *skb, __u32 offset, __u32 from, __u32 to, __u8 proto)
{
	long bad = bpf_l3_csum_replace(skb, L3 + offsetof(struct ip4, sum), from, to, 4);

	if (proto == NEXT_TCP)
		bad |= bpf_l4_csum_replace(skb, L4 + offsetof(struct tcp, sum), from, to, 4 | BPF_F_PSEUDO_HDR);
	else if (proto == NEXT_UDP)
		bad |= bpf_l4_csum_replace(skb, L4 + offsetof(struct udp, sum), from, to, 4 | BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0);
	bad |= bpf_skb_store_bytes(skb, L3 + offset, &to, 4, 0);
	return !bad;
}

/* reset answers a TCP segment with a reset, from whom it was for. */
static __always_inline int reset(struct __sk_buff *skb)
{
	struct {
		struct eth eth;
		struct ip4 ip;
		struct tcp tcp;
	} __attribute__((packed, aligned(2))) out = {}, in;
	__u32 sum, payload;

	if (bpf_skb_load_bytes(skb, 0, &in, sizeof(in)))
		return TC_ACT_SHOT;
	if (in.tcp.flags & TCP_RST)
		return TC_ACT_SHOT;
	payload = bpf_ntohs(in.ip.len) - sizeof(in.ip) - (in.tcp.offset >> 4) * 4;
	if (in.tcp.flags & (TCP_SYN | TCP_FIN))
		payload++;
	if (bpf_skb_change_tail(skb, sizeof(out), 0))
		return TC_ACT_SHOT;
	__builtin_memcpy(out.eth.dst, in.eth.src, 6);
	__builtin_memcpy(out.eth.src, in.eth.dst, 6);
	out.eth.type = ETH_IP4;
	out.ip.version_ihl = 0x45;
	out.ip.len = bpf_htons(sizeof(out) - sizeof(out.eth));
	out.ip.ttl = 64;
	out.ip.next = NEXT_TCP;
	out.ip.src = in.ip.dst;
	out.ip.dst = in.ip.src;
	out.ip.sum = fold(add_words(0, (__u16 *)&out.ip, sizeof(out.ip) / 2));
	out.tcp.ports.src = in.tcp.ports.dst;
	out.tcp.ports.dst = in.tcp.ports.src;
	out.tcp.offset = 5 << 4;
	out.tcp.flags = TCP_RST;
	if (in.tcp.flags & TCP_ACK) {
		out.tcp.seq = in.tcp.ack;
	} else {
		out.tcp.flags |= TCP_ACK;
		out.tcp.ack = bpf_htonl(bpf_ntohl(in.tcp.seq) + payload);
	}
	/* The pseudo header (RFC 9293, 3.1). */
	sum = bpf_htons(NEXT_TCP) + bpf_htons(sizeof(out.tcp));
	sum += (out.ip.src & 0xffff) + (out.ip.src >> 16) + (out.ip.dst & 0xffff) + (out.ip.dst >> 16);
	out.tcp.sum = fold(add_words(sum, (__u16 *)&out.tcp, sizeof(out.tcp) / 2));
	if (bpf_skb_store_bytes(skb, 0, &out, sizeof(out), 0))
		return TC_ACT_SHOT;
	return bpf_redirect(skb->ifindex, 0);
}

/* answer_arp says to a container that a virtual address is at the router's MAC. */
static __always_inline int answer_arp(struct __sk_buff *skb, const struct port *p)
{
	struct dest_key k = { .vni = p->vni };
	struct eth eth;
	struct arp a;
	__u32 asked;

	if (bpf_skb_load_bytes(skb, L3, &a, sizeof(a)) || a.op != bpf_htons(1) || a.sender_ip == 0)
		return TC_ACT_UNSPEC;
	map_ip4(&k.at, a.target_ip);
	if (!bpf_map_lookup_elem(&weft_services, &k))
		return TC_ACT_UNSPEC;
	__builtin_memcpy(eth.dst, a.sender, 6);
	__builtin_memset(eth.src, 0xee, 6); /* RouterMAC */
	eth.type = ETH_ARP;
	__builtin_memcpy(a.target, a.sender, 6);
	__builtin_memcpy(a.sender, eth.src, 6);
	asked = a.target_ip;
	a.target_ip = a.sender_ip;
	a.sender_ip = asked;
	a.op = bpf_htons(2);
	if (bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0) || bpf_skb_store_bytes(skb, L3, &a, sizeof(a), 0))
		return TC_ACT_SHOT;
	return bpf_redirect(skb->ifindex, 0);
}

/* lead gives a packet, from f->src to the virtual address f->dst, to a task. */
#define PASS_ON 100
static __always_inline int lead(struct __sk_buff *skb, const struct flow *f, const struct flow_to *to)
{
	if (!rewrite(skb, offsetof(struct ip4, dst), f->dst, to->ip4, f->proto))
		return TC_ACT_SHOT;
	/* A task that reaches itself takes nothing from its own address. */
	if (to->ip4 == f->src && !rewrite(skb, offsetof(struct ip4, src), f->src, f->dst, f->proto))
		return TC_ACT_SHOT;
	if (bpf_skb_store_bytes(skb, 0, to->mac, 6, 0))
		return TC_ACT_SHOT;
	if (to->ip4 == f->src)
		return deliver(skb, skb->ifindex);
	return PASS_ON;
}

/* opens reports whether a packet begins something new, as far as can be seen: of UDP each
 * may. Answers alone never do. */
static __always_inline int opens(struct __sk_buff *skb, __u32 proto)
{
	struct tcp *tcp = at(skb, L4);

	if (proto == NEXT_TCP)
		return holds(skb, tcp, sizeof(*tcp)) && (tcp->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	if (proto == NEXT_ICMP)
		return holds(skb, tcp, 1) && *(__u8 *)tcp == 8; /* echo */
	return 1;
}

/* answer_of is the flow of the answers that a task gives to a flow. */
static __always_inline void answer_of(struct flow *back, const struct flow *f, __u32 task)
{
	back->vni = f->vni;
	back->src = task;
	back->dst = f->src;
	back->proto = f->proto;
	back->sport = f->proto == NEXT_ICMP ? f->sport : f->dport;
	back->dport = f->proto == NEXT_ICMP ? 0 : f->sport;
}

/* find returns the task of a flow, or null. */
static __always_inline struct flow_to *find(const struct flow *f)
{
	struct flow_to *to = 0;

	if (f->proto == NEXT_TCP)
		to = bpf_map_lookup_elem(&weft_flows_to, f);
	return to ? to : bpf_map_lookup_elem(&weft_brief_to, f);
}

/* vip_of returns the virtual address that answers come from, or null. */
static __always_inline __u32 *vip_of(const struct flow *back)
{
	__u32 *vip = 0;

	if (back->proto == NEXT_TCP)
		vip = bpf_map_lookup_elem(&weft_flows_from, back);
	return vip ? vip : bpf_map_lookup_elem(&weft_brief_from, back);
}

/* expect lets the answers of a flow to a virtual address come from there. The table may
 * have lost that, or another flow between the two may have taken its place. lasting: the
 * flow is a connection, with a place in the tables of those. */
static __always_inline int expect(const struct flow *f, const struct flow_to *to, int lasting)
{
	struct flow back = {};
	struct flow_to *self;
	__u32 *vip;

	answer_of(&back, f, to->ip4);
	if (to->ip4 == f->src) { /* it answers the virtual address too */
		back.dst = f->dst;
		self = find(&back);
		return (self && self->ip4 == to->ip4) || !bpf_map_update_elem(&weft_brief_to, &back, to, BPF_ANY);
	}
	if (f->proto == NEXT_TCP) {
		vip = bpf_map_lookup_elem(&weft_flows_from, &back);
		if (vip && *vip == f->dst)
			return 1;
		if (lasting)
			return !bpf_map_update_elem(&weft_flows_from, &back, &f->dst, BPF_ANY);
		if (vip)
			bpf_map_delete_elem(&weft_flows_from, &back);
	}
	vip = bpf_map_lookup_elem(&weft_brief_from, &back);
	return (vip && *vip == f->dst) || !bpf_map_update_elem(&weft_brief_from, &back, &f->dst, BPF_ANY);
}

/* unmask lets the answers of what goes to a task's own address come from there: the client
 * may have asked it by a virtual one before, from the same port. */
static __always_inline void unmask(const struct flow *f)
{
	struct flow back = {};

	answer_of(&back, f, f->dst);
	if (!vip_of(&back))
		return;
	bpf_map_delete_elem(&weft_flows_from, &back);
	bpf_map_delete_elem(&weft_brief_from, &back);
}

/* establish gives a connection its place among those that last. Of one of a task to itself
 * each direction is a flow to the virtual address. */
static __always_inline int establish(const struct flow *f, const struct flow_to *to)
{
	return !bpf_map_update_elem(&weft_flows_to, f, to, BPF_ANY) && expect(f, to, 1);
}

/* close notes that a side closes a connection. When both have, or one resets it, its place
 * is among the brief flows, where the last acknowledgements find it. */
static __always_inline void close(const struct flow *f, struct flow_to *known, __u8 flags, __u16 side)
{
	struct flow back = {};
	struct flow_to to;

	if (!(flags & (TCP_FIN | TCP_RST)))
		return;
	if ((flags & TCP_RST) || known->ip4 == f->src)
		side = CLOSED_CLIENT | CLOSED_TASK;
	known->closed |= side;
	to = *known;
	if (to.closed != (CLOSED_CLIENT | CLOSED_TASK))
		return;
	answer_of(&back, f, to.ip4);
	if (bpf_map_update_elem(&weft_brief_to, f, &to, BPF_ANY))
		return;
	if (to.ip4 != f->src && bpf_map_update_elem(&weft_brief_from, &back, &f->dst, BPF_ANY))
		return;
	bpf_map_delete_elem(&weft_flows_to, f);
	bpf_map_delete_elem(&weft_flows_from, &back);
}

/* tcp_flags returns those of a segment, or 0. */
static __always_inline __u8 tcp_flags(struct __sk_buff *skb)
{
	struct tcp *tcp = at(skb, L4);

	return holds(skb, tcp, sizeof(*tcp)) ? tcp->flags : 0;
}

/* task_of finds the task of a flow that is known and follows the life of a connection.
 * Zero: none is. */
static __always_inline int task_of(struct __sk_buff *skb, const struct flow *f, struct flow_to *to)
{
	__u8 flags = f->proto == NEXT_TCP ? tcp_flags(skb) : 0;
	struct flow_to *known;

	if (f->proto == NEXT_TCP) {
		known = bpf_map_lookup_elem(&weft_flows_to, f);
		if (known) {
			if (flags & TCP_SYN)
				known->closed = 0; /* again from the same port */
			*to = *known;
			expect(f, to, 1);
			close(f, known, flags, CLOSED_CLIENT);
			return 1;
		}
	}
	known = bpf_map_lookup_elem(&weft_brief_to, f);
	if (!known)
		return 0;
	if (flags & TCP_SYN)
		known->closed = 0;
	*to = *known;
	if ((flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK)) == TCP_ACK && !to->closed && establish(f, to))
		return 1;
	expect(f, to, 0);
	return 1;
}

/* translate changes the destination of a packet to a virtual address into that of a
 * task. routed: it was sent to the router's MAC, which nobody else has and at which virtual
 * addresses are said to be. PASS_ON: go on with the packet; everything else is a verdict. */
static __always_inline int translate(struct __sk_buff *skb, const struct port *p, int routed)
{
	struct dest_key k = { .vni = p->vni };
	struct flow f = {};
	struct flow_to to = {}, *known;
	struct part part = {};
	struct service *s = 0;
	int which = part_of(skb, p->vni, &part);
	__u32 i;

	if (which == NEXT_PART) {
		f.src = part.src;
		f.dst = part.dst;
	} else if (!flow_of(skb, p->vni, &f)) {
		return PASS_ON;
	}
	map_ip4(&k.at, f.dst);
	if (routed)
		s = bpf_map_lookup_elem(&weft_services, &k);
	if (!s) {
		if (which != NEXT_PART && opens(skb, f.proto))
			unmask(&f);
		return PASS_ON;
	}
	if (which == NEXT_PART) {
		known = bpf_map_lookup_elem(&weft_parts, &part);
		if (!known)
			return PASS_ON;
		to = *known;
		return lead(skb, &f, &to);
	}
	if (!task_of(skb, &f, &to)) {
		/* Flows of tasks that are gone were removed. */
		if (!opens(skb, f.proto) || s->n == 0)
			return f.proto == NEXT_TCP ? reset(skb) : TC_ACT_SHOT;
		i = bpf_get_prandom_u32() % s->n;
		if (i >= MAX_BACKENDS)
			return TC_ACT_SHOT;
		to.ip4 = s->backends[i].ip4;
		__builtin_memcpy(to.mac, s->backends[i].mac, 6);
		if (bpf_map_update_elem(&weft_brief_to, &f, &to, BPF_ANY) || !expect(&f, &to, 0))
			return TC_ACT_SHOT;
	}
	if (which == FIRST_PART)
		bpf_map_update_elem(&weft_parts, &part, &to, BPF_ANY);
	return lead(skb, &f, &to);
}

/* translate_error gives an ICMP error about a packet to a task (RFC 792) the virtual
 * address to which the client had sent it. Sums of ICMP stay right: the sum of the header
 * inside makes up for its address. */
static __always_inline int translate_error(struct __sk_buff *skb, __u32 vni)
{
	const __u32 at_inner = L4 + 8;
	struct {
		struct ip4 ip;
		struct ports ports;
	} __attribute__((packed)) in;
	struct ip4 ip;
	struct flow f = {};
	__u32 *vip, to;
	__u8 type;

	if (bpf_skb_load_bytes(skb, L3, &ip, sizeof(ip)) || ip.version_ihl != 0x45 || ip.next != NEXT_ICMP || (ip.frag & IP4_PART))
		return 1;
	if (bpf_skb_load_bytes(skb, L4, &type, 1) || (type != 3 && type != 11 && type != 12))
		return 1; /* unreachable, time exceeded, parameter problem */
	if (bpf_skb_load_bytes(skb, at_inner, &in, sizeof(in)) || in.ip.version_ihl != 0x45 || (in.ip.frag & IP4_OFFSET))
		return 1;
	f.vni = vni;
	f.src = in.ip.dst;
	f.dst = in.ip.src;
	f.proto = in.ip.next;
	f.sport = in.ports.dst;
	f.dport = in.ports.src;
	vip = vip_of(&f);
	if (!vip)
		return 1;
	to = *vip;
	if (bpf_l3_csum_replace(skb, at_inner + offsetof(struct ip4, sum), in.ip.dst, to, 4) ||
	    bpf_skb_store_bytes(skb, at_inner + offsetof(struct ip4, dst), &to, 4, 0))
		return 0;
	return ip.src != in.ip.dst || rewrite(skb, offsetof(struct ip4, src), ip.src, to, 0);
}

/* answered follows the life of a connection by the answers, from a task, to its client. */
static __always_inline void answered(const struct flow *back, __u32 vip, __u8 flags)
{
	struct flow f = {
		.vni = back->vni, .src = back->dst, .dst = vip, .sport = back->dport, .dport = back->sport, .proto = NEXT_TCP,
	};
	struct flow_to *known;

	if (!(flags & (TCP_FIN | TCP_RST)))
		return;
	known = bpf_map_lookup_elem(&weft_flows_to, &f);
	if (known)
		close(&f, known, flags, CLOSED_TASK);
}

/* translate_back gives the answer of a task the virtual address that was asked. */
static __always_inline int translate_back(struct __sk_buff *skb, __u32 vni)
{
	struct flow f = {};
	struct part part = {};
	struct flow_to first = {}, *known;
	int which = part_of(skb, vni, &part);
	__u32 *vip;

	if (which == NEXT_PART) {
		known = bpf_map_lookup_elem(&weft_parts, &part);
		return !known || rewrite(skb, offsetof(struct ip4, src), part.src, known->ip4, 0);
	}
	if (!flow_of(skb, vni, &f))
		return translate_error(skb, vni);
	vip = vip_of(&f);
	if (!vip)
		return 1;
	first.ip4 = *vip;
	if (f.proto == NEXT_TCP)
		answered(&f, first.ip4, tcp_flags(skb));
	if (which == FIRST_PART)
		bpf_map_update_elem(&weft_parts, &part, &first, BPF_ANY);
	return rewrite(skb, offsetof(struct ip4, src), f.src, first.ip4, f.proto);
}
