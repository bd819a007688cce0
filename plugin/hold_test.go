package main

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane/kerneltest"
)

// A published port is held in both families, refused to others meanwhile, and free
// after.
func TestHoldPort(t *testing.T) {
	hold := func(proto, at string) (io.Closer, error) {
		return holdPort(proto, netip.MustParseAddrPort(at), netip.MustParseAddrPort("192.0.2.1:80"))
	}
	for _, proto := range []string{"tcp", "udp", "sctp"} {
		t.Run(proto, func(t *testing.T) {
			kerneltest.Netns(t)
			if proto == "sctp" && !hasSCTP() {
				if os.Getenv("WEFT_GUEST") != "" {
					t.Error("the guest's kernel has no SCTP")
				}
				if _, err := hold(proto, "0.0.0.0:80"); !errors.Is(err, unix.EPROTONOSUPPORT) {
					t.Errorf("without SCTP in the kernel: %v", err)
				}
				return
			}
			for range 2 {
				var held []io.Closer
				for _, at := range []string{"0.0.0.0:80", "[::]:80", "127.0.0.1:81", "[::1]:81"} {
					c, err := hold(proto, at)
					if err != nil {
						t.Fatalf("%s: %v", at, err)
					}
					held = append(held, c)
				}
				for _, at := range []string{"0.0.0.0:80", "[::]:80", "127.0.0.1:80", "[::1]:80", "0.0.0.0:81", "[::]:81"} {
					if _, err := hold(proto, at); !errors.Is(err, unix.EADDRINUSE) {
						t.Errorf("%s a second time: %v", at, err)
					}
				}
				for _, c := range held {
					if err := c.Close(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
}

func hasSCTP() bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP)
	if err == nil {
		_ = unix.Close(fd)
	}
	return err == nil
}
