/* What is longer than the network's MTU is answered as by a router on the way (RFC 792,
 * RFC 1191, RFC 8201): a container keeps the MTU with which it started, and what a bridge
 * or a link behind it does not take is lost without a word. */
#pragma once

#include "vip.h"

#define ICMP_UNREACHABLE 3
#define ICMP_TOO_LONG 4 /* code: fragmentation needed and DF set */
#define ICMP_ECHO 8
#define ICMP_ECHO_REPLY 0
#define ICMP6_TOO_LONG 2
#define ICMP6_INFO 128 /* and above: no errors */
#define MIN_MTU6 1280
#define GSO_BY_FRAGS 0xffff /* of SCTP: as long as its chunks, which are not told */

struct too_long { /* ICMP and ICMPv6 */
	__u8 type;
	__u8 code;
	__u16 sum;
	__be32 mtu;
};

/* fits reports whether the packet, whose header of the transport is at l4, is no longer
 * than so many bytes on the wire, where a large segment is cut into its pieces. */
static __always_inline int fits(struct __sk_buff *skb, __u32 mtu, __u32 l4, __u8 next)
{
	__u32 header = sizeof(struct udp);
	__u8 offset;

	if (!skb->gso_size)
		return skb->len - L3 <= mtu;
	if (skb->gso_size == GSO_BY_FRAGS)
		return 1;
	if (next == NEXT_TCP) {
		if (bpf_skb_load_bytes(skb, l4 + offsetof(struct tcp, offset), &offset, 1))
			return 1;
		header = (offset >> 4) * 4;
	}
	return l4 - L3 + header + skb->gso_size <= mtu;
}

/* answer sends back the frame, behind whose Ethernet header the answer stands. */
static __always_inline int answer(struct __sk_buff *skb, const struct eth *in)
{
	struct eth out = { .type = in->type };

	__builtin_memcpy(out.dst, in->src, 6);
	__builtin_memcpy(out.src, in->dst, 6);
	return bpf_skb_store_bytes(skb, 0, &out, sizeof(out), 0) ? TC_ACT_SHOT : bpf_redirect(skb->ifindex, 0);
}

static __always_inline int too_long4(struct __sk_buff *skb, const struct port *p)
{
	struct {
		struct eth eth;
		struct ip4 ip;
		__u8 l4[8];
	} __attribute__((packed, aligned(2))) in;
	struct {
		struct ip4 ip;
		struct too_long icmp;
		struct ip4 quote;
		__u8 l4[8];
	} __attribute__((packed, aligned(2))) out = {};

	if (bpf_skb_load_bytes(skb, 0, &in, sizeof(in)) || in.ip.version_ihl != 0x45 || (in.ip.frag & IP4_OFFSET))
		return PASS_ON;
	/* Where the host routes, it cuts what may be cut. On a bridge nobody does, and
	 * Linux cuts smaller once it is told. */
	if ((p->flags & PORT_ROUTED) && !(in.ip.frag & IP4_DF))
		return PASS_ON;
	if (in.ip.next == NEXT_ICMP && in.l4[0] != ICMP_ECHO && in.l4[0] != ICMP_ECHO_REPLY)
		return PASS_ON; /* no error about an error (RFC 1122, 3.2.2) */
	if (fits(skb, p->mtu, L4, in.ip.next))
		return PASS_ON;
	if (bpf_skb_change_tail(skb, L3 + sizeof(out), 0))
		return TC_ACT_SHOT;
	out.ip.version_ihl = 0x45;
	out.ip.len = bpf_htons(sizeof(out));
	out.ip.ttl = 64;
	out.ip.next = NEXT_ICMP;
	out.ip.src = in.ip.dst;
	out.ip.dst = in.ip.src;
	out.ip.sum = fold(add_words(0, (__u16 *)&out.ip, sizeof(out.ip) / 2));
	out.icmp.type = ICMP_UNREACHABLE;
	out.icmp.code = ICMP_TOO_LONG;
	out.icmp.mtu = bpf_htonl(p->mtu);
	out.quote = in.ip;
	__builtin_memcpy(out.l4, in.l4, sizeof(out.l4));
	out.icmp.sum = fold(add_words(0, (__u16 *)&out.icmp, (sizeof(out) - sizeof(out.ip)) / 2));
	if (bpf_skb_store_bytes(skb, L3, &out, sizeof(out), 0))
		return TC_ACT_SHOT;
	return answer(skb, &in.eth);
}

static __always_inline int too_long6(struct __sk_buff *skb, const struct port *p)
{
	__u32 mtu = p->mtu < MIN_MTU6 ? MIN_MTU6 : p->mtu, sum;
	struct {
		struct eth eth;
		struct ip6 ip;
		__u8 l4[16]; /* of a fragment, its header and the next one's beginning */
	} __attribute__((packed, aligned(2))) in;
	struct {
		struct ip6 ip;
		struct too_long icmp;
		struct ip6 quote;
		__u8 l4[16];
	} __attribute__((packed, aligned(2))) out = {};

	if (bpf_skb_load_bytes(skb, 0, &in, sizeof(in)))
		return PASS_ON;
	if (in.ip.next == NEXT_ICMP6 && in.l4[0] < ICMP6_INFO)
		return PASS_ON; /* RFC 4443, 2.4 */
	if (fits(skb, mtu, L3 + sizeof(in.ip), in.ip.next))
		return PASS_ON;
	if (bpf_skb_change_tail(skb, L3 + sizeof(out), 0))
		return TC_ACT_SHOT;
	out.ip.version_class_flow = bpf_htonl(6 << 28);
	out.ip.len = bpf_htons(sizeof(out) - sizeof(out.ip));
	out.ip.next = NEXT_ICMP6;
	out.ip.hops = 64;
	out.ip.src = in.ip.dst;
	out.ip.dst = in.ip.src;
	out.icmp.type = ICMP6_TOO_LONG;
	out.icmp.mtu = bpf_htonl(mtu);
	out.quote = in.ip;
	__builtin_memcpy(out.l4, in.l4, sizeof(out.l4));
	/* The pseudo header (RFC 8200, 8.1). */
	sum = out.ip.len + bpf_htons(NEXT_ICMP6);
	out.icmp.sum = fold(add_words(sum, (__u16 *)&out.ip.src, (sizeof(out) - offsetof(struct ip6, src)) / 2));
	if (bpf_skb_store_bytes(skb, L3, &out, sizeof(out), 0))
		return TC_ACT_SHOT;
	return answer(skb, &in.eth);
}

/* too_long answers what is longer than the network's MTU. PASS_ON: it is not. What goes to
 * many has nobody in whose name to answer. */
static __always_inline int too_long(struct __sk_buff *skb, const struct port *p)
{
	struct eth eth;

	if (!p->mtu || skb->len - L3 <= p->mtu)
		return PASS_ON;
	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)) || (eth.dst[0] & 1))
		return PASS_ON;
	if (eth.type == ETH_IP4)
		return too_long4(skb, p);
	if (eth.type == ETH_IP6)
		return too_long6(skb, p);
	return PASS_ON;
}
