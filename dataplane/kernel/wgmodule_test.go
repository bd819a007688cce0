package kernel

import (
	"errors"
	"os"
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// lateClient is a client that found the module, or did not.
type lateClient struct{ found, closed bool }

func (c *lateClient) Device(string) (*wgtypes.Device, error) {
	return &wgtypes.Device{}, c.ConfigureDevice("", wgtypes.Config{})
}

func (c *lateClient) ConfigureDevice(string, wgtypes.Config) error {
	if !c.found {
		return os.ErrNotExist
	}
	return nil
}

func (c *lateClient) Close() error {
	c.closed = true
	return nil
}

// Where WireGuard's module is loaded only after Weft began, or anew, devices are found.
// A device that is not there is not looked for twice.
func TestModuleThatComesLate(t *testing.T) {
	first := &lateClient{}
	var opened []*lateClient
	loaded, links := false, map[string]bool{}
	m := tunnels{own: map[string]*ownDevice{}, module: wgModule{client: first, there: func(name string) bool { return links[name] },
		open: func() (wgClient, error) {
			opened = append(opened, &lateClient{found: loaded})
			return opened[len(opened)-1], nil
		}}}
	expect := func(what string, err, want error, clients int) {
		t.Helper()
		if !errors.Is(err, want) || len(opened) != clients {
			t.Errorf("%s: %v after %d new clients, want %v after %d", what, err, len(opened), want, clients)
		}
	}
	_, err := m.device("weftw0")
	expect("no link", err, os.ErrNotExist, 0)
	links["weftw0"], loaded = true, true // to make the link loaded the module
	expect("after the link was made", m.configure("weftw0", wgtypes.Config{}), nil, 1)
	if !first.closed {
		t.Error("the socket of the client before is left open")
	}
	_, err = m.device("weftw0")
	expect("as always", err, nil, 1)
	opened[0].found = false // loaded anew: it has another number
	_, err = m.device("weftw0")
	expect("after the module was loaded anew", err, nil, 2)
	opened[1].found, loaded = false, false
	_, err = m.device("weftw0")
	expect("a link without a module", err, os.ErrNotExist, 3)
	m.close()
	if !opened[2].closed || !opened[1].closed {
		t.Error("a socket is left open")
	}
}
