/* The headers that the programs look at, by the documents that define them. */
#pragma once

#include "maps.h"

#define ETH_IP4 bpf_htons(0x0800)
#define ETH_IP6 bpf_htons(0x86dd)
#define ETH_ARP bpf_htons(0x0806)
#define ETH_VLAN bpf_htons(0x8100)
#define ETH_QINQ bpf_htons(0x88a8)
#define ETH_LENGTH 0x0600 /* smaller: a length, of an 802.3 frame */

#define NEXT_HOP 0 /* hop-by-hop options */
#define NEXT_TCP 6
#define NEXT_UDP 17
#define NEXT_ROUTE 43
#define NEXT_FRAGMENT 44
#define NEXT_ESP 50
#define NEXT_AH 51
#define NEXT_ICMP6 58
#define NEXT_NONE 59
#define NEXT_DEST 60
#define NEXT_ICMP 1

struct eth {
	__u8 dst[6];
	__u8 src[6];
	__be16 type;
};

struct ip4 { /* RFC 791 */
	__u8 version_ihl;
	__u8 tos;
	__be16 len;
	__be16 id;
	__be16 frag;
	__u8 ttl;
	__u8 next;
	__u16 sum;
	__u32 src;
	__u32 dst;
};
#define IP4_PART bpf_htons(0x3fff)   /* more fragments, or an offset */
#define IP4_DF bpf_htons(0x4000)     /* do not fragment */
#define IP4_OFFSET bpf_htons(0x1fff)

struct ip6 { /* RFC 8200 */
	__be32 version_class_flow;
	__be16 len;
	__u8 next;
	__u8 hops;
	struct addr src;
	struct addr dst;
};

struct udp {
	__be16 src;
	__be16 dst;
	__be16 len;
	__u16 sum;
};

struct vxlan { /* RFC 7348 */
	__u8 flags;
	__u8 reserved[3];
	__be32 vni; /* and 8 reserved bits */
};
#define VXLAN_VNI 0x08

struct arp { /* RFC 826, for IPv4 over Ethernet */
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_len;
	__u8 protocol_len;
	__be16 op;
	__u8 sender[6];
	__u32 sender_ip;
	__u8 target[6];
	__u32 target_ip;
} __attribute__((packed));

#define ICMP_REDIRECT 5 /* RFC 792 */
#define ICMP_ROUTER 9   /* an advertisement of one, RFC 1256 */

struct nd { /* RFC 4861, 4.3 and 4.4 */
	__u8 type;
	__u8 code;
	__u16 sum;
	__u32 flags;
	struct addr target;
};
#define ND_RS 133
#define ND_RA 134
#define ND_NS 135
#define ND_NA 136
#define ND_REDIRECT 137

/* Since Linux 6.3; older headers lack it, and older kernels refuse it. */
#define DECAP_L3_IPV6 (1ULL << 8)

/* what VXLAN puts in front of the inner IP packet, behind the outer Ethernet header. */
struct tunnel {
	struct ip4 ip;
	struct udp udp;
	struct vxlan vxlan;
	struct eth eth;
} __attribute__((packed, aligned(2)));

static __always_inline int same_mac(const __u8 *a, const __u8 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4] && a[5] == b[5];
}

static __always_inline int same_addr(const struct addr *a, const struct addr *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

static __always_inline int no_addr(const struct addr *a)
{
	return !(a->w[0] | a->w[1] | a->w[2] | a->w[3]);
}

static __always_inline void map_ip4(struct addr *a, __u32 ip)
{
	a->w[0] = 0;
	a->w[1] = 0;
	a->w[2] = bpf_htonl(0xffff);
	a->w[3] = ip;
}

/* add_words adds n words of 16 bits to a sum; fold makes it the checksum (RFC 1071). */
static __always_inline __u32 add_words(__u32 sum, const __u16 *w, int n)
{
	int i;

#pragma unroll
	for (i = 0; i < n; i++)
		sum += w[i];
	return sum;
}

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return ~(__u16)((sum & 0xffff) + (sum >> 16));
}

/* host returns the settings; they are always there. */
static __always_inline struct settings *host(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&weft_settings, &zero);
}

/* link_local is the address that follows from a MAC (RFC 4291, appendix A). */
static __always_inline void link_local(struct addr *a, const __u8 *mac)
{
	a->w[0] = bpf_htonl(0xfe800000);
	a->w[1] = 0;
	a->w[2] = bpf_htonl((__u32)(mac[0] ^ 2) << 24 | (__u32)mac[1] << 16 | (__u32)mac[2] << 8 | 0xff);
	a->w[3] = bpf_htonl(0xfe000000 | (__u32)mac[3] << 16 | (__u32)mac[4] << 8 | mac[5]);
}

static __always_inline void *at(struct __sk_buff *skb, __u32 offset)
{
	return (void *)(long)skb->data + offset;
}

/* pull makes up to n bytes of the frame readable in place. */
static __always_inline void pull(struct __sk_buff *skb, __u32 n)
{
	bpf_skb_pull_data(skb, skb->len < n ? skb->len : n);
}

/* deliver hands a frame to the container behind a link, whose MAC it has: the link here
 * has another one. */
static __always_inline int deliver(struct __sk_buff *skb, __u32 link)
{
	bpf_skb_change_type(skb, 0 /* PACKET_HOST */);
	return bpf_redirect_peer(link, 0);
}

/* holds reports whether n bytes from p can be read in place. */
#define holds(skb, p, n) ((void *)(p) + (n) <= (void *)(long)(skb)->data_end)
