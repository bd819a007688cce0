//go:build ignore

/* The port program. from_container runs on the host's side of every endpoint's link,
 * from_underlay on the link that leads to the other hosts, from_tunnel on the WireGuard
 * devices; all as tc filters on ingress. What they do not know, or what is not plain,
 * they leave to the bridge, the routes and the rules, which are complete without them. */
#include "guard.h"
#include "mtu.h"
#include "vip.h"
#include "flow.h"
#include <linux/pkt_cls.h>

/* send_to sends the packet out of a link to a neighbour there. */
static __always_inline int send_to(__u32 link, __u32 neighbour)
{
	struct bpf_redir_neigh hop;

	__builtin_memset(&hop, 0, sizeof(hop)); /* an initializer leaves a part of the union */
	hop.nh_family = 2; /* AF_INET */
	hop.ipv4_nh = neighbour;
	return bpf_redirect_neigh(link, &hop, sizeof(hop), 0);
}

static __always_inline int encapsulate(struct __sk_buff *skb, const struct settings *s, const struct port *p, const struct dest *d)
{
	__u32 hash = bpf_get_hash_recalc(skb), len = skb->len, mtu = 0;
	struct tunnel t = {};
	struct eth eth;
	__u8 tos = 0;

	if (bpf_check_mtu(skb, s->underlay, &mtu, sizeof(t), 0))
		return TC_ACT_UNSPEC;
	if (bpf_skb_load_bytes(skb, 0, &t.eth, sizeof(t.eth)))
		return TC_ACT_UNSPEC;
	if (t.eth.type == ETH_IP4) {
		if (bpf_skb_load_bytes(skb, sizeof(eth) + 1, &tos, 1))
			return TC_ACT_UNSPEC;
	} else {
		__be16 class;

		if (bpf_skb_load_bytes(skb, sizeof(eth), &class, 2))
			return TC_ACT_UNSPEC;
		tos = bpf_ntohs(class) >> 4;
	}
	if (bpf_skb_adjust_room(skb, sizeof(t), BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
					BPF_F_ADJ_ROOM_ENCAP_L2(sizeof(eth)) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH))
		return TC_ACT_UNSPEC;
	t.ip.version_ihl = 0x45;
	t.ip.tos = tos & 3; /* congestion is told on; the rest is the container's (RFC 6040) */
	t.ip.len = bpf_htons(len + sizeof(t) - sizeof(eth));
	t.ip.id = (__u16)bpf_get_prandom_u32();
	t.ip.ttl = 64;
	t.ip.next = NEXT_UDP;
	t.ip.src = s->self;
	t.ip.dst = d->peer;
	t.ip.sum = fold(add_words(0, (__u16 *)&t.ip, sizeof(t.ip) / 2));
	t.udp.src = bpf_htons(0xc000 | (hash & 0x3fff));
	t.udp.dst = s->port;
	t.udp.len = bpf_htons(len + sizeof(t) - sizeof(eth) - sizeof(t.ip));
	t.vxlan.flags = VXLAN_VNI;
	t.vxlan.vni = bpf_htonl(p->vni << 8);
	if (bpf_skb_store_bytes(skb, sizeof(eth), &t, sizeof(t), 0))
		return TC_ACT_SHOT; /* the frame is half made */
	eth.type = ETH_IP4;
	if (bpf_skb_store_bytes(skb, 12, &eth.type, 2, 0))
		return TC_ACT_SHOT;
	if (d->flags & DEST_DIRECT)
		return send_to(s->underlay, d->peer);
	return bpf_redirect_neigh(s->underlay, 0, 0, 0);
}

/* age takes one from the packet's time to live, as each router does. Zero: nothing is
 * left, or the headers cannot be read. */
static __always_inline int age(struct __sk_buff *skb, __be16 type)
{
	if (type == ETH_IP4) {
		struct ip4 *ip = at(skb, sizeof(struct eth));
		__u32 sum;

		if (!holds(skb, ip, sizeof(*ip)) || ip->ttl <= 1)
			return 0;
		sum = ip->sum + (__u32)bpf_htons(0x0100); /* RFC 1141 */
		ip->sum = (__u16)(sum + (sum >> 16));
		ip->ttl--;
		return 1;
	}
	struct ip6 *ip = at(skb, sizeof(struct eth));

	if (!holds(skb, ip, sizeof(*ip)) || ip->hops <= 1)
		return 0;
	ip->hops--;
	return 1;
}

/* lives reports whether a packet, after so many bytes in front, has time for another hop. */
static __always_inline int lives(struct __sk_buff *skb, __u32 front, __be16 type)
{
	if (type == ETH_IP4) {
		struct ip4 *ip = at(skb, front);

		return holds(skb, ip, sizeof(*ip)) && ip->ttl > 1;
	}
	struct ip6 *ip = at(skb, front);

	return holds(skb, ip, sizeof(*ip)) && ip->hops > 1;
}

/* hand_over gives a packet to an endpoint of this host. */
static __always_inline int hand_over(struct __sk_buff *skb, __be16 type, __u32 vni, const struct dest *d)
{
	__u32 link = d->link;

	if ((d->flags & DEST_VIPS) && type == ETH_IP4 && !translate_back(skb, vni))
		return TC_ACT_SHOT;
	return deliver(skb, link);
}

/* route_to hands a packet to a local endpoint of a routed network. */
static __always_inline int route_to(struct __sk_buff *skb, __be16 type, const struct dest *d)
{
	struct eth *eth = at(skb, 0);

	if (!holds(skb, eth, sizeof(*eth)) || !age(skb, type))
		return TC_ACT_UNSPEC;
	eth = at(skb, 0);
	if (!holds(skb, eth, sizeof(*eth)))
		return TC_ACT_SHOT;
	__builtin_memcpy(eth->dst, d->mac, 6);
	__builtin_memset(eth->src, 0xee, 6); /* RouterMAC */
	return hand_over(skb, type, d->vni, d);
}

/* plain reports whether the packet, after so many bytes in front, is IP in one piece
 * without options, and where it goes. */
static __always_inline int plain(struct __sk_buff *skb, __u32 front, __be16 type, struct addr *src, struct addr *dst)
{
	if (type == ETH_IP4) {
		struct ip4 *ip = at(skb, front);

		if (!holds(skb, ip, sizeof(*ip)) || ip->version_ihl != 0x45 || (ip->frag & IP4_PART))
			return 0;
		map_ip4(src, ip->src);
		map_ip4(dst, ip->dst);
		return 1;
	}
	if (type == ETH_IP6) {
		struct ip6 *ip = at(skb, front);

		if (!holds(skb, ip, sizeof(*ip)))
			return 0;
		if (ip->next != NEXT_TCP && ip->next != NEXT_UDP && ip->next != NEXT_ICMP6)
			return 0;
		*src = ip->src;
		*dst = ip->dst;
		return 1;
	}
	return 0;
}

/* into_tunnel gives a packet to the WireGuard device, which takes it without an Ethernet
 * header. If the device is gone, so is the packet. */
static __always_inline int into_tunnel(struct __sk_buff *skb, __be16 type, const struct dest *d)
{
	__u32 link = d->link, mtu = 0;

	if (bpf_check_mtu(skb, link, &mtu, -(__s32)sizeof(struct eth), 0) || !age(skb, type))
		return TC_ACT_UNSPEC;
	return bpf_redirect(link, 0);
}

static __always_inline struct dest *dest_of(__u32 vni, const struct addr *a)
{
	struct dest_key k = { .vni = vni, .at = *a };

	return bpf_map_lookup_elem(&weft_dests, &k);
}

static __always_inline struct dest *dest_of_mac(__u32 vni, const __u8 *mac)
{
	struct dest_key k = { .vni = vni };

	__builtin_memcpy(&k.at, mac, 6);
	return bpf_map_lookup_elem(&weft_dests, &k);
}

/* forward takes a frame of an endpoint to where it goes, or leaves it to the stack. */
static __always_inline int forward(struct __sk_buff *skb, const struct settings *s, const struct port *p)
{
	struct addr src, dst;
	struct eth *eth = at(skb, 0);
	struct dest *d;
	__be16 type;

	if (!holds(skb, eth, sizeof(*eth)))
		return TC_ACT_UNSPEC;
	type = eth->type;
	if (!(p->flags & PORT_ROUTED)) {
		if (eth->dst[0] & 1)
			return TC_ACT_UNSPEC;
		d = dest_of_mac(p->vni, eth->dst);
		if (!d || (d->flags & DEST_STACK))
			return TC_ACT_UNSPEC;
		if (d->link)
			return hand_over(skb, type, p->vni, d);
		if (!d->peer || !s->self || !plain(skb, sizeof(struct eth), type, &src, &dst))
			return TC_ACT_UNSPEC;
		return encapsulate(skb, s, p, d);
	}
	if (!plain(skb, sizeof(struct eth), type, &src, &dst))
		return TC_ACT_UNSPEC;
	d = dest_of(0, &dst);
	if (!d || d->vni != p->vni || (d->flags & DEST_STACK))
		return TC_ACT_UNSPEC;
	if (d->flags & DEST_TUNNEL)
		return into_tunnel(skb, type, d);
	if (d->link)
		return route_to(skb, type, d);
	if ((d->flags & DEST_DIRECT) && type == ETH_IP4) {
		__u32 mtu = 0;

		if (bpf_check_mtu(skb, s->underlay, &mtu, 0, 0) || !age(skb, type))
			return TC_ACT_UNSPEC;
		return send_to(s->underlay, d->peer);
	}
	return TC_ACT_UNSPEC;
}

/* virtual looks for packets to virtual addresses, and past them to their tasks. */
static __always_inline int virtual(struct __sk_buff *skb, const struct port *p)
{
	struct eth *eth = at(skb, 0);

	if (!holds(skb, eth, sizeof(*eth)))
		return PASS_ON;
	if (eth->type == ETH_ARP)
		return answer_arp(skb, p);
	if (eth->type == ETH_IP4)
		return translate(skb, p, eth->dst[0] == 0xee && eth->dst[5] == 0xee);
	return PASS_ON;
}

SEC("tc")
int weft_from_container(struct __sk_buff *skb)
{
	__u32 link = skb->ifindex;
	struct port *p = bpf_map_lookup_elem(&weft_ports, &link);
	struct settings *s = host();
	struct sent sent = {};
	struct counters *c;
	int what;

	if (!p || !s)
		return TC_ACT_UNSPEC;
	look(skb, s, p, &sent);
	c = bpf_map_lookup_elem(&weft_counters, &link);
	if (p->flags & PORT_GUARD) {
		int why = guard(skb, p);

		if (why != PASS) {
			if (c)
				c->dropped[why & (REASONS - 1)]++;
			tally(&sent, why & (REASONS - 1));
			return TC_ACT_SHOT;
		}
	}
	what = too_long(skb, p);
	if (what != PASS_ON) {
		tally(&sent, VERDICT_LONG);
		return what;
	}
	what = TC_ACT_UNSPEC;
	if (p->flags & (PORT_FAST | PORT_VIPS)) {
		/* Headers may lie outside of the linear part. */
		if (!holds(skb, at(skb, 0), sizeof(struct eth) + sizeof(struct ip6)))
			pull(skb, sizeof(struct eth) + sizeof(struct ip6));
		what = PASS_ON;
		if (p->flags & PORT_VIPS)
			what = virtual(skb, p);
		if (what == PASS_ON) {
			look_behind(skb, &sent);
			what = p->flags & PORT_FAST ? forward(skb, s, p) : TC_ACT_UNSPEC;
		}
	}
	tally(&sent, what == TC_ACT_UNSPEC ? VERDICT_SLOW : what == TC_ACT_SHOT ? VERDICT_LOST : VERDICT_FAST);
	if (c && what == TC_ACT_UNSPEC)
		c->slow++;
	else if (c)
		c->fast++;
	return what;
}

/* arrived returns the endpoint to which a packet of a routed network came, after so many
 * bytes in front, if its sender is one that comes this way (DEST_DIRECT, DEST_TUNNEL). */
static __always_inline struct dest *arrived(struct __sk_buff *skb, __u32 front, __be16 type, __u16 way)
{
	struct addr src, dst;
	struct dest *to, *from;

	if (!plain(skb, front, type, &src, &dst))
		return 0;
	to = dest_of(0, &dst);
	if (!to || !to->link || (to->flags & (DEST_STACK | DEST_TUNNEL)))
		return 0;
	from = dest_of(0, &src);
	return from && from->vni == to->vni && (from->flags & way) ? to : 0;
}

/* arrive takes a packet of a routed network from its peer to the endpoint. */
static __always_inline int arrive(struct __sk_buff *skb, __be16 type)
{
	struct dest *to = arrived(skb, sizeof(struct eth), type, DEST_DIRECT);

	return to ? route_to(skb, type, to) : TC_ACT_UNSPEC;
}

/* weft_from_tunnel takes what a WireGuard device decrypted, which has no Ethernet header,
 * to the endpoint. The device let the peer send from no address but its own. */
SEC("tc")
int weft_from_tunnel(struct __sk_buff *skb)
{
	struct eth eth = { .type = skb->protocol };
	struct dest *to;

	if (!holds(skb, at(skb, 0), sizeof(struct ip6)))
		pull(skb, sizeof(struct ip6));
	to = arrived(skb, 0, eth.type, DEST_TUNNEL);
	/* What is left to the stack must not have got a header. */
	if (!to || !lives(skb, 0, eth.type) || bpf_skb_change_head(skb, sizeof(eth), 0))
		return TC_ACT_UNSPEC;
	if (bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0))
		return TC_ACT_SHOT;
	return route_to(skb, eth.type, to);
}

SEC("tc")
int weft_from_underlay(struct __sk_buff *skb)
{
	const __u32 front = sizeof(struct eth) + sizeof(struct tunnel);
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;
	struct settings *s = host();
	struct vxlan *vxlan;
	struct eth *eth, inner;
	struct ip4 *ip;
	struct udp *udp;
	struct dest *d;
	__u32 len;

	if (!s || !s->self || skb->vlan_present)
		return TC_ACT_UNSPEC;
	if (!holds(skb, at(skb, 0), front))
		pull(skb, front);
	eth = at(skb, 0);
	ip = at(skb, sizeof(*eth));
	if (!holds(skb, ip, sizeof(*ip)))
		return TC_ACT_UNSPEC;
	if (eth->type != ETH_IP4 || ip->dst != s->self)
		return s->flags & HAS_ROUTED ? arrive(skb, eth->type) : TC_ACT_UNSPEC;
	if (ip->next != NEXT_UDP || ip->version_ihl != 0x45 || (ip->frag & IP4_PART) || !holds(skb, eth, front))
		return TC_ACT_UNSPEC;
	udp = (void *)(ip + 1);
	vxlan = (void *)(udp + 1);
	inner = *(struct eth *)(vxlan + 1);
	if (udp->dst != s->port || vxlan->flags != VXLAN_VNI)
		return TC_ACT_UNSPEC;
	if ((ip->tos & 3) == 3 || (inner.dst[0] & 1) || (inner.type != ETH_IP4 && inner.type != ETH_IP6))
		return TC_ACT_UNSPEC; /* congestion has to be told on (RFC 6040); the stack does */
	len = bpf_ntohs(udp->len);
	if (len != bpf_ntohs(ip->len) - sizeof(*ip) || (!skb->gso_size && len + sizeof(*ip) + sizeof(*eth) != skb->len))
		return TC_ACT_UNSPEC;
	/* Number 0 of the peers is the canary: no host. */
	if (skb->len < front + sizeof(*ip) || !ip->src || !bpf_map_lookup_elem(&weft_peers, &ip->src))
		return TC_ACT_UNSPEC;
	d = dest_of_mac(bpf_ntohl(vxlan->vni) >> 8, inner.dst);
	if (!d || !d->link || (d->flags & DEST_STACK))
		return TC_ACT_UNSPEC;
	if (inner.type == ETH_IP6)
		flags |= DECAP_L3_IPV6;
	if (bpf_skb_adjust_room(skb, -(__s32)sizeof(struct tunnel), BPF_ADJ_ROOM_MAC, flags))
		return TC_ACT_UNSPEC;
	if (bpf_skb_store_bytes(skb, 0, &inner, sizeof(inner), 0))
		return TC_ACT_SHOT;
	return hand_over(skb, inner.type, d->vni, d);
}

/* weft_to_container sees what the host's stack sends to an endpoint, on egress of its
 * link. */
SEC("tc")
int weft_to_container(struct __sk_buff *skb)
{
	__u32 link = skb->ifindex;
	struct port *p = bpf_map_lookup_elem(&weft_ports, &link);
	struct eth *eth;

	if (!p || !(p->flags & PORT_VIPS))
		return TC_ACT_UNSPEC;
	if (!holds(skb, at(skb, 0), L4 + 8))
		pull(skb, L4 + 8);
	eth = at(skb, 0);
	if (!holds(skb, eth, sizeof(*eth)) || eth->type != ETH_IP4)
		return TC_ACT_UNSPEC;
	return translate_back(skb, p->vni) ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

char _license[] SEC("license") = "Dual BSD/GPL";
