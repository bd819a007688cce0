/* The guard: what a container may send. Whatever is not of an address of its own, or
 * pretends to be a router, a DHCP server or a bridge, ends here. */
#pragma once

#include "packet.h"

#define MAX_HEADERS 6 /* of an IPv6 packet, before that of the transport */
#define MAX_ND_OPTIONS 4

/* own_addr: the endpoint's own address, or the link-local one that follows from its MAC. */
static __always_inline int own_addr(const struct port *p, const struct addr *a)
{
	struct addr local;

	if (no_addr(a))
		return 0;
	if (same_addr(a, &p->ip6))
		return 1;
	link_local(&local, p->mac);
	return same_addr(a, &local);
}

static __always_inline int guard_arp(struct __sk_buff *skb, const struct port *p)
{
	struct arp a;

	if (bpf_skb_load_bytes(skb, sizeof(struct eth), &a, sizeof(a)))
		return DROP_SHORT;
	if (a.hardware != bpf_htons(1) || a.protocol != ETH_IP4 || a.hardware_len != 6 || a.protocol_len != 4)
		return DROP_ARP;
	if (!same_mac(a.sender, p->mac))
		return DROP_ARP;
	if (a.sender_ip == p->ip4 && p->ip4)
		return PASS;
	/* A probe (RFC 5227) asks whether an address is free. To whom is about to take it
	 * that says that it is not, so nobody asks for another's. */
	return a.op == bpf_htons(1) && a.sender_ip == 0 && a.target_ip == p->ip4 && p->ip4 ? PASS : DROP_ARP;
}

/* guard_nd looks at a message of neighbour discovery from offset to end; anonymous: its
 * sender has no address. */
static __always_inline int guard_nd(struct __sk_buff *skb, const struct port *p, __u32 offset, __u32 end, __u8 type, int anonymous)
{
	struct {
		__u8 type, len;
		__u8 mac[6];
	} __attribute__((packed)) option;
	struct nd m;
	int i;

	if (type == ND_RA || type == ND_REDIRECT)
		return DROP_RA;
	if (type == ND_NS || type == ND_NA) {
		if (bpf_skb_load_bytes(skb, offset, &m, sizeof(m)))
			return DROP_SHORT;
		/* Without an address a host asks whether one is free; as with ARP. */
		if ((type == ND_NA || anonymous) && !own_addr(p, &m.target))
			return DROP_ND;
		offset += sizeof(m);
	} else {
		offset += 8; /* a router solicitation */
	}
	for (i = 0; i < MAX_ND_OPTIONS; i++) {
		if (offset == end)
			return PASS;
		if (bpf_skb_load_bytes(skb, offset, &option, sizeof(option)))
			return DROP_ND;
		/* Addresses of links (1, 2) and the nonce of RFC 7527 (14). */
		if (option.len != 1 || (option.type != 1 && option.type != 2 && option.type != 14))
			return DROP_ND;
		if (option.type != 14 && !same_mac(option.mac, p->mac))
			return DROP_ND;
		offset += sizeof(option);
	}
	return DROP_ND;
}

/* guard_udp refuses what only a DHCP server sends. Most clients look at their own port
 * alone. */
static __always_inline int guard_udp(struct __sk_buff *skb, __u32 offset, __u32 end, __be16 server, __be16 client)
{
	struct udp udp;

	if (offset + sizeof(struct udp) > end)
		return DROP_SHORT;
	if (bpf_skb_load_bytes(skb, offset, &udp, sizeof(udp)))
		return DROP_SHORT;
	return udp.src == server || udp.dst == client ? DROP_DHCP : PASS;
}

/* Of a packet it is what lies before end that counts, by its own length. The rest is
 * padding, which the receiver takes off: where a header seems to be there, it really is
 * in the next fragment, which nobody looks at. */
static __always_inline int guard_ip4(struct __sk_buff *skb, const struct port *p)
{
	struct ip4 ip;
	__u32 header, end;
	__u8 type;

	if (bpf_skb_load_bytes(skb, sizeof(struct eth), &ip, sizeof(ip)))
		return DROP_SHORT;
	header = (ip.version_ihl & 15) * 4;
	if (ip.version_ihl >> 4 != 4 || header < sizeof(ip) || bpf_ntohs(ip.len) < header)
		return DROP_HEADERS;
	end = sizeof(struct eth) + bpf_ntohs(ip.len);
	if (end > skb->len)
		return DROP_SHORT;
	if (!p->ip4 || ip.src != p->ip4)
		return DROP_IP4;
	if (ip.frag & IP4_OFFSET)
		return PASS; /* no header follows; what the first fragment says decides */
	header += sizeof(struct eth);
	if (ip.next == NEXT_UDP)
		return guard_udp(skb, header, end, bpf_htons(67), bpf_htons(68));
	if (ip.next == NEXT_ICMP) {
		if (header >= end || bpf_skb_load_bytes(skb, header, &type, sizeof(type)))
			return DROP_SHORT;
		if (type == ICMP_REDIRECT || type == ICMP_ROUTER)
			return DROP_RA;
	}
	return PASS;
}

static __always_inline int guard_ip6(struct __sk_buff *skb, const struct port *p)
{
	struct {
		__u8 next, len;
		__be16 offset; /* of a fragment */
	} ext;
	struct ip6 ip;
	__u32 offset = sizeof(struct eth) + sizeof(ip), end;
	__u8 next, type;
	int i;

	if (bpf_skb_load_bytes(skb, sizeof(struct eth), &ip, sizeof(ip)))
		return DROP_SHORT;
	if ((bpf_ntohl(ip.version_class_flow) >> 28) != 6)
		return DROP_HEADERS;
	end = ip.len ? offset + bpf_ntohs(ip.len) : skb->len; /* 0: a jumbogram (RFC 2675) */
	if (end > skb->len)
		return DROP_SHORT;
	next = ip.next;
	for (i = 0; i < MAX_HEADERS; i++) {
		if (next != NEXT_HOP && next != NEXT_ROUTE && next != NEXT_DEST && next != NEXT_FRAGMENT && next != NEXT_AH)
			break;
		if (offset + 8 > end || bpf_skb_load_bytes(skb, offset, &ext, sizeof(ext)))
			return DROP_SHORT;
		if (next == NEXT_FRAGMENT && (ext.offset & bpf_htons(0xfff8))) {
			/* What follows is no header; what the first fragment says decides. */
			return own_addr(p, &ip.src) ? PASS : DROP_IP6;
		}
		offset += next == NEXT_FRAGMENT ? 8 : next == NEXT_AH ? (ext.len + 2) * 4 : (ext.len + 1) * 8;
		next = ext.next;
	}
	if (i == MAX_HEADERS)
		return DROP_HEADERS;
	if (next == NEXT_ICMP6) {
		if (offset >= end || bpf_skb_load_bytes(skb, offset, &type, sizeof(type)))
			return DROP_SHORT;
		if (type >= ND_RS && type <= ND_REDIRECT) {
			if (i > 0)
				return DROP_ND; /* RFC 6980; nobody puts headers before these */
			i = guard_nd(skb, p, offset, end, type, no_addr(&ip.src));
			if (i != PASS)
				return i;
			if (no_addr(&ip.src))
				return type == ND_NA ? DROP_ND : PASS;
		}
		/* Memberships are told before there is an address (RFC 3590). */
		if (no_addr(&ip.src))
			return type == 143 || type == 131 || type == 132 ? PASS : DROP_IP6;
	}
	if (!own_addr(p, &ip.src))
		return DROP_IP6;
	if (next == NEXT_UDP)
		return guard_udp(skb, offset, end, bpf_htons(547), bpf_htons(546));
	return PASS;
}

/* guard returns PASS, or why the frame must go. */
static __always_inline int guard(struct __sk_buff *skb, const struct port *p)
{
	struct eth eth;

	if (skb->vlan_present)
		return DROP_VLAN;
	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return DROP_SHORT;
	if (!same_mac(eth.src, p->mac))
		return DROP_MAC;
	/* Bridges speak to each other by these (IEEE 802.1D, table 7-10). */
	if (eth.dst[0] == 0x01 && eth.dst[1] == 0x80 && eth.dst[2] == 0xc2 && eth.dst[3] == 0 && eth.dst[4] == 0 && eth.dst[5] < 0x10)
		return DROP_BRIDGE;
	switch (eth.type) {
	case ETH_IP4:
		return guard_ip4(skb, p);
	case ETH_IP6:
		return guard_ip6(skb, p);
	case ETH_ARP:
		return guard_arp(skb, p);
	case ETH_VLAN:
	case ETH_QINQ:
		return DROP_VLAN;
	}
	if (bpf_ntohs(eth.type) < ETH_LENGTH && !(p->flags & PORT_OTHER))
		return DROP_BRIDGE;
	return p->flags & PORT_OTHER ? PASS : DROP_TYPE;
}
