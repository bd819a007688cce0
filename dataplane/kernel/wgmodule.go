package kernel

import (
	"errors"
	"os"
	"sync"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// wgClient is what is used of wgctrl.Client.
type wgClient interface {
	Device(name string) (*wgtypes.Device, error)
	ConfigureDevice(name string, c wgtypes.Config) error
	Close() error
}

func openWGClient() (wgClient, error) {
	c, err := wgctrl.New()
	if err != nil {
		return nil, err // not a nil *wgctrl.Client
	}
	return c, nil
}

// wgModule speaks with the kernel's WireGuard. A client looks up whether there is one,
// and under which number it is asked, when it is opened: one from before the module was
// loaded, perhaps by our making of a link, or from before it was loaded anew, finds no
// device. So the client is opened anew when it does not find one that is there.
type wgModule struct {
	open  func() (wgClient, error)
	there func(device string) bool // there is a link of that name and kind

	mu     sync.Mutex // guards client
	client wgClient
}

// do asks about a device or changes it.
func (m *wgModule) do(device string, ask func(wgClient) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := ask(m.client)
	if !errors.Is(err, os.ErrNotExist) || !m.there(device) {
		return err
	}
	fresh, openErr := m.open()
	if openErr != nil {
		return errors.Join(err, openErr)
	}
	_ = m.client.Close()
	m.client = fresh
	return ask(fresh)
}

// look asks about a device as it is: a client that finds none stays.
func (m *wgModule) look(device string) (*wgtypes.Device, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.client.Device(device)
}

func (m *wgModule) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.client != nil {
		_ = m.client.Close()
	}
}
